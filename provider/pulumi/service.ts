/**
 * The handlers as Pulumi's engine calls them over gRPC: the `ResourceProvider` service. Source: provider.proto, and
 * sdk/go/common/resource/plugin/provider_plugin.go, of pulumi.
 */
import { isDeepStrictEqual } from "node:util";
import type * as grpc from "@grpc/grpc-js";
import type { Composed } from "../core/component.js";
import { isLvmNbdError, LvmNbdError, printable } from "../core/errors.js";
import type { Answer } from "../core/functions.js";
import type { Environment, Handlers } from "../core/handlers.js";
import { keptInstead, organizationMissing } from "../core/owner.js";
import { PartialFailure } from "../core/partialFailure.js";
import type { Problem } from "../core/resource.js";
import type { NamedHosts } from "../ssh/types.js";
import { type Decoded, decode, encode, holdsSecret } from "./codec.js";
import {
  hostsIn,
  organizationIn,
  problemsOfConfiguration,
  variablesOf,
  withSecretHosts,
} from "./configuration.js";
import type { Door } from "./construct.js";
import { diffResponse, ignoring } from "./diff.js";
import { connectEngineLog, type EngineLog } from "./engine.js";
import { Owners } from "./owners.js";
import { Empty, pluginProto, providerProto, type Struct, structOf } from "./proto.js";
import { failureStatus } from "./status.js";
import { notKnown, unknownProperties, unknownValue, withoutProperties } from "./unknowns.js";
import { functionName, parseUrn, typeName, type Urn } from "./urn.js";

/** What the service is made of. */
export interface Parts {
  readonly version: string;
  /** The package's schema, as JSON. */
  schema(): Promise<string>;
  /** The handlers of a type. They are loaded when first asked for: the engine waits for the first answer. */
  handlers(type: string, environment: Omit<Environment, "openHost">): Promise<Handlers>;
  /** Asks a function, by its name. */
  ask(name: string, args: Bag, environment: Omit<Environment, "openHost">): Promise<Answer>;
  /** What a component of that type is made of; see `composeAs`. */
  compose(
    type: string,
    environment: Omit<Environment, "openHost">,
    ...declared: Parameters<Door["compose"]>
  ): Promise<Composed>;
}

type Bag = Readonly<Record<string, unknown>>;

/** A request about one resource. */
interface OfResource {
  getUrn(): string;
  getTimeout?(): number;
}

/** One call about a resource. */
interface Operation {
  readonly urn: Urn;
  readonly handlers: Handlers;
  readonly log: EngineLog;
}

/** `engineAddress`: of the engine that started this process, if one did. */
export function createService(parts: Parts, engineAddress?: string): grpc.UntypedServiceImplementation {
  let engine = connectEngineLog(engineAddress);
  let connected = engineAddress;
  const owners = new Owners();
  let hosts: NamedHosts = new Map();
  /** Of the calls that are not answered yet. Not one signal for all: what waits for that is kept as long as it. */
  const running = new Set<AbortController>();
  let cancelled = false;
  /** Ids of what this run made, by URN. */
  const made = new Map<string, string>();

  /** An engine begins. It ends with a cancel; a plugin that somebody else started serves the next one then. */
  const connect = (address: string) => {
    cancelled = false;
    made.clear();
    if (address === connected) return;
    engine.close();
    engine = connectEngineLog(address);
    connected = address;
  };

  /** Runs work that ends with a cancel, and when its time has passed. */
  const bounded = async <T>(
    log: EngineLog,
    seconds: number,
    work: (environment: Omit<Environment, "openHost">) => Promise<T>,
  ): Promise<T> => {
    const own = new AbortController();
    if (cancelled) own.abort();
    running.add(own);
    let late = false;
    const end = () => {
      late = !own.signal.aborted;
      own.abort();
    };
    const timer = seconds > 0 ? setTimeout(end, Math.min(seconds * 1000, longest)) : undefined;
    try {
      const { progress, warn } = log;
      return await work({ namedHosts: () => hosts, progress, warn, signal: own.signal });
    } catch (error) {
      throw late ? timedOut(error, seconds) : error;
    } finally {
      running.delete(own);
      clearTimeout(timer);
      await log.delivered();
    }
  };

  /** Runs the work of a call about a resource. */
  const operate = async <T>(request: OfResource, work: (operation: Operation) => Promise<T>): Promise<T> => {
    const urn = parseUrn(request.getUrn());
    const log = engine.on(request.getUrn());
    return bounded(log, request.getTimeout?.() ?? 0, async (environment) =>
      work({ urn, handlers: await parts.handlers(typeName(urn.type), environment), log }),
    );
  };

  return {
    handshake: unary(async (request: providerProto.ProviderHandshakeRequest) => {
      connect(request.getEngineAddress());
      const response = new providerProto.ProviderHandshakeResponse();
      response.setAcceptSecrets(true);
      response.setAcceptResources(true);
      response.setAcceptOutputs(true);
      response.setSupportsAutonamingConfiguration(true);
      return response;
    }),

    attach: unary(async (request: pluginProto.PluginAttach) => {
      connect(request.getAddress());
      return new Empty();
    }),

    getPluginInfo: unary(async () => {
      const info = new pluginProto.PluginInfo();
      info.setVersion(parts.version);
      return info;
    }),

    getSchema: unary(async (request: providerProto.GetSchemaRequest) => {
      if (request.getVersion() !== 0) throw invalid(`there is no version ${request.getVersion()} of schemas`);
      const response = new providerProto.GetSchemaResponse();
      response.setSchema(await parts.schema());
      return response;
    }),

    checkConfig: unary(async (request: providerProto.CheckRequest) => {
      const inputs = withSecretHosts(request.getNews());
      const news = decode(inputs);
      const response = new providerProto.CheckResponse();
      response.setInputs(inputs);
      const problems = [...news.refused, ...(await problemsOfConfiguration(news.values))];
      response.setFailuresList(problems.map((problem) => failureOf(problem, news)));
      return response;
    }),

    // Credentials and names alone: no resource is to be made anew for them.
    diffConfig: unary(async (request: providerProto.DiffRequest) => {
      const [old, news] = [decode(request.getOldInputs() ?? request.getOlds()), decode(request.getNews())];
      const keys = new Set([...Object.keys(old.values), ...Object.keys(news.values)]);
      const { plainValue } = await import("../core/configuration.js");
      const changed = [...keys].filter(
        (key) => !isDeepStrictEqual(plainValue(old.values[key]), plainValue(news.values[key])),
      );
      const changes = changed.map((property) => ({ property, effect: "connection" }) as const);
      return diffResponse({ changes, deleteBeforeReplace: false }, old.values, news.values);
    }),

    configure: unary(async (request: providerProto.ConfigureRequest) => {
      const values = request.hasArgs() ? known(decode(request.getArgs())) : variablesOf(request);
      hosts = await hostsIn(values);
      owners.organization = organizationIn(values);
      const response = new providerProto.ConfigureResponse();
      response.setAcceptsecrets(true);
      response.setAcceptresources(true);
      response.setAcceptoutputs(true);
      response.setSupportspreview(true);
      response.setSupportsAutonamingConfiguration(true);
      return response;
    }),

    check: unary((request: providerProto.CheckRequest) =>
      operate(request, async ({ urn, handlers }) => {
        const news = decode(request.getNews());
        const olds = decode(request.getOlds()).values;
        const unknown = unknownProperties(news.values);
        const old = Object.keys(olds).length === 0 ? undefined : withoutProperties(olds, unknown);
        const owner = news.values.owner ?? owners.of(request.getUrn(), urn, olds.owner);
        const name = handlers.nameInput && nameOf(request, urn, old?.[handlers.nameInput]);
        const wanted = {
          ...(handlers.nameInput === undefined || name === undefined ? {} : { [handlers.nameInput]: name }),
          ...news.values,
          ...(owner === undefined ? {} : { owner }),
        };
        const { inputs, problems } = await handlers.check(old, withoutProperties(wanted, unknown), unknown);
        const response = new providerProto.CheckResponse();
        const later = Object.entries(news.values).filter(([key]) => unknown.has(key));
        response.setInputs(encode({ ...inputs, ...Object.fromEntries(later) }, news.secrets));
        const refusedProperties = new Set(news.refused.map(({ property }) => property.split(".")[0]));
        const others = problems.filter(
          ({ property }) => property !== "owner" && !refusedProperties.has(property.split(".")[0]),
        );
        const unowned = owner === undefined ? [{ property: "", reason: organizationMissing }] : [];
        response.setFailuresList(
          [...news.refused, ...unowned, ...others].map((problem) => failureOf(problem, news)),
        );
        return response;
      }),
    ),

    diff: unary((request: providerProto.DiffRequest) =>
      operate(request, async ({ handlers }) => {
        const state = known(decode(request.getOlds()));
        const news = decode(request.getNews());
        const unknown = unknownProperties(news.values);
        const ignored = request.getIgnorechangesList();
        const wanted = ignoring(ignored, state, withoutProperties(news.values, unknown));
        const result = await handlers.diff(state, wanted, unknown);
        const old = request.hasOldInputs() ? decode(request.getOldInputs()).values : state;
        const changes = result.changes.filter(({ property }) => !ignored.includes(property));
        return diffResponse({ ...result, changes }, old, news.values);
      }),
    ),

    create: unary((request: providerProto.CreateRequest) =>
      operate(request, async ({ handlers, log }) => {
        const news = decode(request.getProperties());
        const response = new providerProto.CreateResponse();
        if (request.getPreview()) {
          response.setProperties(await previewed(handlers, undefined, news, news.secrets));
          return response;
        }
        const { id, state } = await keeping(news.secrets, handlers.create(known(news)));
        made.set(request.getUrn(), id);
        log.progress(`made ${id}`);
        response.setId(id);
        response.setProperties(encode(state, news.secrets));
        return response;
      }),
    ),

    read: unary((request: providerProto.ReadRequest) =>
      operate(request, async ({ urn, handlers }) => {
        const olds = decode(request.getProperties());
        const response = new providerProto.ReadResponse();
        if ("owner" in olds.values) {
          const state = await handlers.read(known(olds));
          if (state === undefined) return response;
          response.setId(request.getId());
          response.setProperties(encode(state, olds.secrets));
          return response;
        }
        // An import gives no properties; a program that only reads gives what it says of it.
        const finder = {
          ...urn,
          organization: owners.organization,
          host: olds.values.host,
          readsOnly: request.hasProperties(),
        };
        const found = await handlers.find(request.getId(), finder);
        if (found === undefined) return response;
        response.setId(found.id);
        response.setProperties(encode(found.state, olds.secrets));
        response.setInputs(encode(found.inputs, olds.secrets));
        return response;
      }),
    ),

    update: unary((request: providerProto.UpdateRequest) =>
      operate(request, async ({ handlers, log }) => {
        const olds = decode(request.getOlds());
        const state = known(olds);
        const sent = decode(request.getNews());
        const news = { ...sent, values: ignoring(request.getIgnorechangesList(), state, sent.values) };
        // Of what is declared, only what is a secret now; the rest stays what it was.
        const kept = [...olds.secrets].filter((path) => !((JSON.parse(path)[0] as string) in sent.values));
        const secrets = new Set([...sent.secrets, ...kept]);
        const response = new providerProto.UpdateResponse();
        if (request.getPreview()) {
          response.setProperties(await previewed(handlers, state, news, secrets));
          return response;
        }
        const now = await keeping(secrets, handlers.update(state, known(news)));
        log.progress(`updated ${request.getId()}`);
        response.setProperties(encode(now, secrets));
        return response;
      }),
    ),

    delete: unary((request: providerProto.DeleteRequest) =>
      operate(request, async ({ handlers, log }) => {
        const state = known(decode(request.getProperties()));
        const own = made.get(request.getUrn());
        if (own !== undefined && own === handlers.id(state)) {
          log.warn(keptInstead(own));
          return new Empty();
        }
        await handlers.remove(state);
        return new Empty();
      }),
    ),

    invoke: unary(async (request: providerProto.InvokeRequest) => {
      const name = functionName(request.getTok());
      const args = decode(request.getArgs());
      const response = new providerProto.InvokeResponse();
      // Only a preview has what is not known yet, and nothing can be told then.
      if (unknownProperties(args.values).size > 0) return response.setReturn(structOf({}));
      const { refused } = args;
      const answer =
        refused.length > 0
          ? { problems: refused }
          : await bounded(engine.on(""), 0, (environment) => parts.ask(name, args.values, environment));
      response.setFailuresList((answer.problems ?? []).map((problem) => failureOf(problem, args)));
      if (answer.problems === undefined) {
        // How a host is reached is in no answer; what else was asked may be.
        const isSecret = Object.keys(args.values).some(
          (key) => key !== "host" && holdsSecret(key, args.values[key], args.secrets),
        );
        const paths = isSecret ? Object.keys(answer.values).map((key) => JSON.stringify([key])) : [];
        response.setReturn(encode(answer.values, new Set(paths)));
      }
      return response;
    }),

    construct: unary((request: providerProto.ConstructRequest) =>
      bounded(engine.on(""), 0, async (environment) => {
        const type = typeName(request.getType());
        const { construct } = await import("./construct.js");
        return construct(request, {
          compose: (...declared) => parts.compose(type, environment, ...declared),
          organization: owners.organization,
          version: parts.version,
          signal: environment.signal,
          async warn(urn, message) {
            const row = engine.on(urn);
            row.warn(message);
            await row.delivered();
          },
        });
      }),
    ),

    cancel: unary(async () => {
      cancelled = true;
      for (const one of running) one.abort();
      return new Empty();
    }),
  };
}

/** The longest time that Node's timers take, 24 days. */
const longest = 2 ** 31 - 1;

/** A method that answers what the work gives, and its failure as a status. */
function unary<Request, Response>(
  work: (request: Request) => Promise<Response>,
): grpc.handleUnaryCall<Request, Response> {
  return ({ request }, answer) => {
    // In a promise also what is thrown at once.
    Promise.resolve(request)
      .then(work)
      .then(
        (response) => answer(null, response),
        (error: unknown) =>
          answer(error instanceof Kept ? failureStatus(error.cause, error) : failureStatus(error)),
      );
  };
}

/** A failed operation with what it made, as it is kept in the state. */
class Kept extends Error {
  constructor(
    readonly id: string,
    readonly properties: Struct,
    override readonly cause: unknown,
  ) {
    super("kept", { cause });
  }
}

async function keeping<T>(secrets: ReadonlySet<string>, work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (error) {
    if (!(error instanceof PartialFailure)) throw error;
    throw new Kept(error.id, encode(error.state, secrets), error.cause);
  }
}

function timedOut(error: unknown, seconds: number): unknown {
  if (error instanceof Kept) return new Kept(error.id, error.properties, timedOut(error.cause, seconds));
  if (!isLvmNbdError(error, "CANCELLED")) return error;
  const message = `it was not done in the ${seconds} seconds that its \`customTimeouts\` give it`;
  return new LvmNbdError("OPERATION_TIMED_OUT", { ...error.details, message, cause: error });
}

function invalid(message: string): LvmNbdError {
  return new LvmNbdError("INVALID_INPUT", { message });
}

/** The values of a message in which all must be known, and plain. */
function known({ values, refused }: Pick<Decoded, "values" | "refused">): Bag {
  const [first] = refused;
  if (first !== undefined) throw invalid(`${first.property} ${first.reason}`);
  const [later] = unknownProperties(values);
  if (later !== undefined) throw invalid(notKnown(later));
  return withoutProperties(values, new Set());
}

/** What a preview tells of the state; what is only known later is in its place, as it came. */
async function previewed(
  handlers: Handlers,
  state: Bag | undefined,
  news: Decoded,
  secrets: ReadonlySet<string>,
): Promise<Struct> {
  known({ values: {}, refused: news.refused });
  const unknown = unknownProperties(news.values);
  const result = await handlers.preview(state, withoutProperties(news.values, unknown), unknown);
  const later = Object.fromEntries(Object.entries(news.values).filter(([key]) => unknown.has(key)));
  const outputs = Object.fromEntries(result.unknown.map((key) => [key, unknownValue]));
  return encode({ ...result.state, ...outputs, ...later }, secrets);
}

/** The name that a thing gets where the program gives none: once it has one by the engine's rules, it keeps that. */
function nameOf(request: providerProto.CheckRequest, { name }: Urn, old: unknown): unknown {
  const { DISABLE } = providerProto.CheckRequest.AutonamingOptions.Mode;
  const autonaming = request.getAutonaming();
  if (autonaming === undefined) return name;
  return autonaming.getMode() === DISABLE ? undefined : (old ?? autonaming.getProposedName());
}

/** Of a property that is named the engine prints the value, were it a key or more than a line: then it is named in the text alone. */
function failureOf({ property, reason }: Problem, { values, secrets }: Decoded): providerProto.CheckFailure {
  const failure = new providerProto.CheckFailure();
  const nested = property.includes(".");
  const value = values[property];
  const shown = nested || (isLine(value) && !holdsSecret(property, value, secrets));
  const named = property !== "" && shown;
  failure.setProperty(named ? property : "");
  failure.setReason(named || property === "" ? reason : `${property}: ${reason}`);
  return failure;
}

/** True if all text in the value stays on its line and drives no terminal. */
function isLine(value: unknown): boolean {
  if (typeof value === "string") return !value.includes("\n") && printable(value) === value;
  if (typeof value !== "object" || value === null) return true;
  return Object.entries(value).every(([key, inner]) => isLine(key) && isLine(inner));
}
