import { Client } from "ssh2";
import { expect, test } from "vitest";
import { enforceWindow } from "../../provider/ssh/receiveWindow.js";

test("what is taken of a packet does not keep the rest of it", () => {
  const taken: Buffer[] = [];
  const take = (_protocol: unknown, _channel: number, data: Buffer) => taken.push(data);
  const handlers = { CHANNEL_DATA: take, CHANNEL_EXTENDED_DATA: take };
  const channel = { readableFlowing: true, incoming: { window: 100 } };
  const inside = { _protocol: { _handlers: handlers }, _chanMgr: { get: () => channel } };
  enforceWindow(Object.assign(new Client(), inside));
  const packet = Buffer.alloc(1024 ** 2, "x");
  handlers.CHANNEL_DATA(undefined, 0, packet.subarray(9, 10));
  expect(taken).toEqual([Buffer.from("x")]);
  expect(taken[0]?.buffer.byteLength).toBeLessThan(packet.length);
});

test("an ssh2 that is not known here is an error, and no connection without bounds", () => {
  expect(() => enforceWindow(new Client())).toThrow(/with this version of ssh2/);
});
