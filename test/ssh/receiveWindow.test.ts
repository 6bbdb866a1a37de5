import { PassThrough } from "node:stream";
import { Client } from "ssh2";
import { beforeEach, describe, expect, test } from "vitest";
import { enforceWindow } from "../../provider/ssh/receiveWindow.js";

const stderr = 1;

let taken: Buffer[];
let asked: unknown[][];
let errors: Error[];
beforeEach(() => {
  taken = [];
  asked = [];
  errors = [];
});

/** ssh2's handlers, of a client with one channel. */
function handlersFor(channel: object, socket = { writableLength: 0 }) {
  const take = (_protocol: unknown, _channel: number, data: Buffer, _type?: number) => {
    taken.push(data);
  };
  const ask = (...request: unknown[]) => {
    asked.push(request);
  };
  const handlers = {
    ...{ CHANNEL_DATA: take, CHANNEL_EXTENDED_DATA: take },
    ...{ GLOBAL_REQUEST: ask, CHANNEL_REQUEST: ask, CHANNEL_OPEN: ask },
  };
  const inside = {
    _protocol: { _handlers: handlers },
    _chanMgr: { get: () => channel },
    _sock: socket,
  };
  const client = Object.assign(new Client(), inside);
  client.on("error", (error) => errors.push(error));
  enforceWindow(client);
  return handlers;
}

describe.each(["CHANNEL_DATA", "CHANNEL_EXTENDED_DATA"] as const)("%s", (kind) => {
  /** A channel that is read, and one that is not; the other of its streams is always read. */
  const channelOf = (flowing: boolean, window: number) => {
    const [stream, other] = [new PassThrough(), new PassThrough().resume()];
    if (flowing) stream.resume();
    const channel = kind === "CHANNEL_DATA" ? stream : other;
    return Object.assign(channel, { stderr: channel === stream ? other : stream, incoming: { window } });
  };

  test("what is taken of a packet keeps neither the rest of it nor Node's pool", () => {
    const handlers = handlersFor(channelOf(true, 100));
    handlers[kind](undefined, 0, Buffer.alloc(1024 ** 2, "x").subarray(9, 10), stderr);
    expect(taken).toEqual([Buffer.from("x")]);
    expect(taken[0]?.buffer.byteLength).toBe(1);
  });

  test("more than the window is an error, and is not taken", () => {
    const handlers = handlersFor(channelOf(true, 3));
    handlers[kind](undefined, 0, Buffer.from("123"), stderr);
    expect(errors).toEqual([]);
    handlers[kind](undefined, 0, Buffer.from("1234"), stderr);
    expect(errors).toMatchObject([{ message: "the host sent more than it may" }]);
    expect(taken).toEqual([Buffer.from("123")]);
  });

  test("bytes by themselves that nobody reads yet are an error long before they are many", () => {
    const send = (flowing: boolean) => {
      const handlers = handlersFor(channelOf(flowing, 1024 ** 2));
      for (let bytes = 0; bytes < 1000 && errors.length === 0; bytes++)
        handlers[kind](undefined, 0, Buffer.from("x"), stderr);
    };
    send(true);
    expect(errors).toEqual([]);
    send(false);
    expect(errors).toMatchObject([{ message: "the host sent more than it may" }]);
  });
});

test("extended data of a type that is not known is not even copied", () => {
  const channel = Object.assign(new PassThrough().resume(), { incoming: { window: 100 } });
  handlersFor(channel).CHANNEL_EXTENDED_DATA(undefined, 0, Buffer.from("x"), 2);
  expect([taken, errors]).toEqual([[], []]);
});

test.each(["GLOBAL_REQUEST", "CHANNEL_REQUEST", "CHANNEL_OPEN"] as const)(
  "%s: a host that asks on and on and takes no answers is an error",
  (kind) => {
    const socket = { writableLength: 3 * 1024 ** 2 };
    const handlers = handlersFor({}, socket);
    handlers[kind]("protocol", "what", true, "data");
    expect([asked, errors]).toEqual([[["protocol", "what", true, "data"]], []]);
    socket.writableLength = 5 * 1024 ** 2;
    handlers[kind]("protocol", "what", true, "data");
    expect(asked).toHaveLength(1);
    expect(errors).toMatchObject([{ message: "the host asks on and on, and takes no answers" }]);
  },
);

test("a host is not asked to prove the other keys that it tells of, for which it may let the client wait", () => {
  handlersFor({}).GLOBAL_REQUEST("protocol", "hostkeys-00@openssh.com", true, ["key"]);
  expect(asked).toEqual([["protocol", "not wanted", true, []]]);
});

test("an ssh2 that is not known here is an error, and no connection without bounds", () => {
  expect(() => enforceWindow(new Client())).toThrow(/with this version of ssh2/);
});
