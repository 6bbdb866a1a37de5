/** Pulumi's engine as far as the plugin sees it: a client of its service, and the log. */
import * as grpc from "@grpc/grpc-js";
import {
  engineGrpc,
  type engineProto,
  providerGrpc,
  providerProto,
  structOf,
} from "../../provider/pulumi/proto.js";
import { createService, type Parts } from "../../provider/pulumi/service.js";

type Values = Readonly<Record<string, unknown>>;

interface LogLine {
  readonly message: string;
  readonly urn: string;
  readonly stream: number;
  readonly severity: number;
  readonly ephemeral: boolean;
}

export const urnOf = (type: string, name = "vm1") => `urn:pulumi:s::p::lvm-nbd:index:${type}::${name}`;

const secretSignature = { "4dabf18193072939515e22adb298388d": "1b47061264138c4ac30d75fd1eb44270" };
/** A secret as it crosses the wire. */
export const secret = (value: unknown) => ({ ...secretSignature, value });

/** Of a test that asks for no component, or no function. */
export const unused = async (name: string): Promise<never> => {
  throw new Error(`nobody asks for a ${name}`);
};

/** The service in this process, asked over a real link. `close` when done. */
export async function startService(parts: Parts, engineAddress?: string) {
  const server = new grpc.Server();
  server.addService(providerGrpc.ResourceProviderService, createService(parts, engineAddress));
  const port = await listen(server);
  const connected = connectPlugin(port);
  return {
    ...connected,
    port,
    close() {
      connected.close();
      server.forceShutdown();
    },
  };
}

/** The methods as promises, of plain values where a message holds property values. */
export function connectPlugin(port: number) {
  const client = new providerGrpc.ResourceProviderClient(
    `127.0.0.1:${port}`,
    grpc.credentials.createInsecure(),
  );
  const about = <R extends { setUrn(urn: string): unknown }>(request: R, urn: string): R => {
    request.setUrn(urn);
    return request;
  };

  return {
    client,
    close: () => client.close(),

    async check(
      urn: string,
      news: Values,
      olds?: Values,
      edit?: (request: providerProto.CheckRequest) => void,
    ) {
      const request = about(new providerProto.CheckRequest(), urn);
      request.setNews(structOf(news));
      request.setOlds(structOf(olds ?? {}));
      edit?.(request);
      const response = await ask<providerProto.CheckResponse>((answer) => client.check(request, answer));
      return {
        inputs: response.getInputs()?.toJavaScript() ?? {},
        failures: response.getFailuresList().map((failure) => failure.toObject()),
      };
    },

    async diff(
      urn: string,
      olds: Values,
      news: Values,
      more: { ignore?: string[]; oldInputs?: Values } = {},
    ) {
      const request = about(new providerProto.DiffRequest(), urn);
      request.setOlds(structOf(olds));
      request.setNews(structOf(news));
      request.setIgnorechangesList(more.ignore ?? []);
      if (more.oldInputs) request.setOldInputs(structOf(more.oldInputs));
      const response = await ask<providerProto.DiffResponse>((answer) => client.diff(request, answer));
      return {
        changes: response.getChanges(),
        replaces: response.getReplacesList(),
        diffs: response.getDiffsList(),
        deleteBeforeReplace: response.getDeletebeforereplace(),
        detailed: Object.fromEntries(
          response
            .getDetaileddiffMap()
            .getEntryList()
            .map(([key]) => [key, response.getDetaileddiffMap().get(key)?.toObject()]),
        ),
      };
    },

    async create(urn: string, properties: Values, more: { preview?: boolean; timeout?: number } = {}) {
      const request = about(new providerProto.CreateRequest(), urn);
      request.setProperties(structOf(properties));
      request.setPreview(more.preview ?? false);
      request.setTimeout(more.timeout ?? 0);
      const response = await ask<providerProto.CreateResponse>((answer) => client.create(request, answer));
      return { id: response.getId(), properties: response.getProperties()?.toJavaScript() };
    },

    async read(urn: string, id: string, properties?: Values, inputs?: Values) {
      const request = about(new providerProto.ReadRequest(), urn);
      request.setId(id);
      if (properties) request.setProperties(structOf(properties));
      if (inputs) request.setInputs(structOf(inputs));
      const response = await ask<providerProto.ReadResponse>((answer) => client.read(request, answer));
      return {
        id: response.getId(),
        properties: response.getProperties()?.toJavaScript(),
        inputs: response.getInputs()?.toJavaScript(),
      };
    },

    async update(
      urn: string,
      olds: Values,
      news: Values,
      more: { preview?: boolean; timeout?: number; ignore?: string[] } = {},
    ) {
      const request = about(new providerProto.UpdateRequest(), urn);
      request.setOlds(structOf(olds));
      request.setNews(structOf(news));
      request.setPreview(more.preview ?? false);
      request.setTimeout(more.timeout ?? 0);
      request.setIgnorechangesList(more.ignore ?? []);
      return (await ask<providerProto.UpdateResponse>((answer) => client.update(request, answer)))
        .getProperties()
        ?.toJavaScript();
    },

    async remove(urn: string, properties: Values, timeout = 0) {
      const request = about(new providerProto.DeleteRequest(), urn);
      request.setProperties(structOf(properties));
      request.setTimeout(timeout);
      await ask((answer) => client.delete(request, answer));
    },

    async invoke(token: string, args: Values) {
      const request = new providerProto.InvokeRequest();
      request.setTok(token);
      request.setArgs(structOf(args));
      const response = await ask<providerProto.InvokeResponse>((answer) => client.invoke(request, answer));
      return {
        values: response.getReturn()?.toJavaScript(),
        failures: response.getFailuresList().map((failure) => failure.toObject()),
      };
    },

    async configure(args: Values) {
      const request = new providerProto.ConfigureRequest();
      request.setArgs(structOf(args));
      return (
        await ask<providerProto.ConfigureResponse>((answer) => client.configure(request, answer))
      ).toObject();
    },

    /** `edit`: what the engine says beside what is declared. */
    async construct(
      type: string,
      name: string,
      inputs: Values,
      edit: (request: providerProto.ConstructRequest) => void,
    ) {
      const request = new providerProto.ConstructRequest();
      request.setType(type);
      request.setName(name);
      request.setInputs(structOf(inputs));
      edit(request);
      const response = await ask<providerProto.ConstructResponse>((answer) =>
        client.construct(request, answer),
      );
      return {
        urn: response.getUrn(),
        state: response.getState()?.toJavaScript(),
        dependencies: Object.fromEntries(
          response
            .getStatedependenciesMap()
            .getEntryList()
            .map(([key]) => [key, response.getStatedependenciesMap().get(key)?.getUrnsList()]),
        ),
      };
    },

    cancel: () => callPlain(client, "Cancel"),
  };
}

/** The answer of a call, as a promise. */
export function ask<Response>(
  start: (answer: (error: grpc.ServiceError | null, response: Response) => void) => unknown,
): Promise<Response> {
  return new Promise((resolve, reject) => {
    start((error, response) => (error ? reject(error) : resolve(response)));
  });
}

/** A call whose request and answer are no bytes, or these. */
export function callPlain(client: grpc.Client, method: string, request = Buffer.alloc(0)): Promise<Buffer> {
  const plain = (value: Buffer) => value;
  return new Promise((resolve, reject) => {
    client.makeUnaryRequest(
      `/pulumirpc.ResourceProvider/${method}`,
      plain,
      plain,
      request,
      (error, answer) => (error ? reject(error) : resolve(answer ?? Buffer.alloc(0))),
    );
  });
}

/** The engine's log. */
export async function startEngine() {
  const lines: LogLine[] = [];
  const server = new grpc.Server();
  const { log } = engineGrpc.EngineService as unknown as grpc.ServiceDefinition;
  if (log === undefined) throw new Error("the engine has no log");
  server.addService(
    // An empty answer is no bytes.
    { log: { ...log, responseSerialize: () => Buffer.alloc(0) } },
    {
      log: (
        { request }: grpc.ServerUnaryCall<engineProto.LogRequest, unknown>,
        answer: grpc.sendUnaryData<unknown>,
      ) => {
        lines.push({
          message: request.getMessage(),
          urn: request.getUrn(),
          stream: request.getStreamid(),
          severity: request.getSeverity(),
          ephemeral: request.getEphemeral(),
        });
        answer(null, {});
      },
    },
  );
  const port = await listen(server);
  return { lines, address: `127.0.0.1:${port}`, close: () => server.forceShutdown() };
}

export function listen(server: grpc.Server): Promise<number> {
  return new Promise((resolve, reject) => {
    server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, bound) =>
      error ? reject(error) : resolve(bound),
    );
  });
}
