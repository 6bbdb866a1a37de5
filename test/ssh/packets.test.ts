import { KeyObject } from "node:crypto";
import { once } from "node:events";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { Client } from "ssh2";
import { afterEach, describe, expect, test, vi } from "vitest";
import { prepareKeys, sendTogether } from "../../provider/ssh/packets.js";
import { startFakeServer } from "./fakeServer.js";

const closing: (() => unknown)[] = [];
afterEach(async () => {
  for (const close of closing.splice(0)) await close();
});

/** A connected socket, and the other end of it. */
async function pair(): Promise<readonly [Socket, Socket]> {
  const server = createServer();
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const near = connect((server.address() as AddressInfo).port, "127.0.0.1");
  const [far]: Socket[] = (await once(server, "connection")) as Socket[];
  if (far === undefined) throw new Error("nobody connected");
  closing.push(
    () => near.destroy(),
    () => far.destroy(),
    () => server.close(),
  );
  return [near, far];
}

describe("what is written in one turn", () => {
  test("goes out together", async () => {
    const [near, far] = await pair();
    sendTogether(near);
    const one = vi.spyOn(near, "_write");
    const several = vi.spyOn(near as Required<Pick<Socket, "_writev">>, "_writev");
    for (const piece of ["len", "payload", "mac"]) near.write(piece);
    const [data] = await once(far, "data");
    expect(String(data)).toBe("lenpayloadmac");
    expect([one.mock.calls.length, several.mock.calls.length]).toEqual([0, 1]);
  });

  test("is sent before the end that follows it at once", async () => {
    const [near, far] = await pair();
    sendTogether(near);
    let heard = "";
    far.on("data", (data) => {
      heard += data;
    });
    near.write("last");
    near.write(" words");
    near.end();
    await once(far, "end");
    expect(heard).toBe("last words");
  });

  test("after the other side has ended is Node's own error, and no crash", async () => {
    const [near, far] = await pair();
    sendTogether(near);
    near.resume();
    far.end();
    await once(near, "end");
    const failed = once(near, "error");
    near.write("too late");
    expect((await failed)[0]).toMatchObject({ code: "EPIPE" });
  });
});

test("a client whose keys are prepared, also after a further exchange of them, talks on", async () => {
  const server = await startFakeServer();
  const client = new Client();
  closing.push(async () => {
    client.end();
    await once(client, "close");
    await server.close();
  });
  client.on("handshake", () => prepareKeys(client));
  client.connect({ host: "127.0.0.1", port: server.port, username: "root", password: "any" });
  await once(client, "ready");
  const { _cipher, _decipher } = (
    client as unknown as {
      readonly _protocol: Record<"_cipher" | "_decipher", Readonly<Record<string, unknown>>>;
    }
  )._protocol;
  // With ssh2's own ciphers, where they could be built, there is nothing to prepare.
  if (_cipher.constructor.name === "AESGCMCipherNative") {
    expect(_cipher._encKey).toBeInstanceOf(KeyObject);
    expect(_decipher._decipherKey).toBeInstanceOf(KeyObject);
  }
  const ask = async () => {
    const channel = await new Promise<NodeJS.ReadableStream>((resolve, reject) =>
      client.exec("true", (error, opened) => (error ? reject(error) : resolve(opened))),
    );
    const [data] = await once(channel, "data");
    return String(data);
  };
  expect(await ask()).toBe("done");
  await new Promise<void>((resolve) => {
    client.once("handshake", () => resolve());
    (client as unknown as { readonly _protocol: { rekey(): void } })._protocol.rekey();
  });
  expect(await ask()).toBe("done");
});
