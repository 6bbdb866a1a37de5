/**
 * Construct: a component for whatever language asks for it. Its parts are registered at the engine's monitor, as a program would do it. Nothing
 * of that is kept in this process: several can be under way. Source: provider.proto, and pkg/resource/deploy/source_eval.go, of pulumi.
 */
import type { Composed, Part } from "../core/component.js";
import { LvmNbdError } from "../core/errors.js";
import { ownerOf } from "../core/owner.js";
import { type Decoded, decode, encode } from "./codec.js";
import { aliasProto, connectMonitor, resourceProto } from "./monitor.js";
import { providerProto, type Struct, structOf } from "./proto.js";
import { notKnown, unknownProperties, unknownValue, withoutProperties } from "./unknowns.js";
import { dynamicToken, pluginToken } from "./urn.js";

type Bag = Readonly<Record<string, unknown>>;
type Request = providerProto.ConstructRequest;

/** What is asked of the service. */
export interface Door {
  compose(name: string, wanted: Bag, unknown: ReadonlySet<string>): Promise<Composed>;
  /** Part of the owners of what is made, where it is known. */
  readonly organization: string | undefined;
  /** Of this plugin: another one is not to make or remove what it has composed. */
  readonly version: string;
  readonly signal: AbortSignal;
  /** Shows what a person should know, on the row of that resource. */
  warn(urn: string, message: string): Promise<void>;
}

/** Properties as they are sent, and the URNs that each was made of. */
interface Sent {
  readonly values: Struct;
  readonly dependencies: ReadonlyMap<string, readonly string[]>;
}

export async function construct(request: Request, door: Door): Promise<providerProto.ConstructResponse> {
  const declared = decode(request.getInputs());
  const unknown = unknownProperties(declared.values);
  refuse(request, declared, unknown);
  const wanted = withoutProperties(declared.values, unknown);
  const composed = await door.compose(request.getName(), wanted, unknown);
  const sent = sender(request, declared, composed);
  const monitor = connectMonitor(request.getMonitorendpoint(), door.signal);
  try {
    const urn = await monitor.register(componentRequest(request));
    if (composed.unsure !== undefined) await door.warn(urn, composed.unsure);
    await Promise.all(
      composed.parts.map((part) =>
        monitor.register(
          partRequest(request, door, urn, part, sent(inputsOf(request, door, part), part.handedOn)),
        ),
      ),
    );
    const later = Object.fromEntries(composed.unknown.map((key) => [key, unknownValue]));
    const state = sent({ ...composed.outputs, ...later }, []);
    await monitor.registerOutputs(urn, state.values);
    const response = new providerProto.ConstructResponse();
    response.setUrn(urn);
    response.setState(state.values);
    for (const [key, urns] of state.dependencies) {
      const dependencies = new providerProto.ConstructResponse.PropertyDependencies();
      dependencies.setUrnsList([...urns]);
      response.getStatedependenciesMap().set(key, dependencies);
    }
    return response;
  } finally {
    monitor.close();
  }
}

function refuse(request: Request, { refused }: Decoded, unknown: ReadonlySet<string>): void {
  const problems = refused.map(({ property, reason }) => `${property} ${reason}`);
  const [later] = unknown;
  if (later !== undefined && !request.getDryrun()) problems.push(notKnown(later));
  if (request.getMonitorendpoint() === "") problems.push("the engine does not say where its monitor is");
  if (request.getName() === "") problems.push("it has no name");
  if (problems.length > 0) throw new LvmNbdError("INVALID_INPUT", { message: problems.join("; ") });
}

/** The inputs of a part that are its own. */
function inputsOf(
  request: Request,
  { organization = request.getOrganization() }: Door,
  { inputs, name }: Part,
): Bag {
  if (organization === "") return inputs;
  return { ...inputs, owner: ownerOf(organization, request.getProject(), request.getStack(), name) };
}

/** What is composed is a secret, and depends on a resource, where one of the inputs is and does that it was made of. */
function sender(request: Request, declared: Decoded, { madeOf }: Composed) {
  const urnsOf = (property: string): string[] => [
    ...(request.getInputdependenciesMap().get(property)?.getUrnsList() ?? []),
    ...(declared.dependencies.get(property) ?? []),
  ];
  const urns = [...new Set(madeOf.flatMap(urnsOf))];
  const isSecret = [...declared.secrets].some((path) => madeOf.includes(JSON.parse(path)[0]));

  return (composed: Bag, handedOn: readonly string[]): Sent => {
    const given = handedOn.filter((key) => key in declared.values);
    const values = { ...Object.fromEntries(given.map((key) => [key, declared.values[key]])), ...composed };
    const own = Object.keys(composed).filter((key) => key !== "owner");
    const secrets = new Set([
      ...declared.secrets,
      ...(isSecret ? own.map((key) => JSON.stringify([key])) : []),
    ]);
    return {
      values: encode(values, secrets),
      dependencies: new Map([
        ...given.map((key) => [key, [...new Set(urnsOf(key))]] as const),
        ...own.map((key) => [key, urns] as const),
      ]),
    };
  };
}

function componentRequest(request: Request): resourceProto.RegisterResourceRequest {
  const component = registration(request, request.getType(), request.getName(), request.getParent());
  component.setObject(structOf({}));
  component.setDependenciesList(request.getDependenciesList());
  component.setAliasesList(request.getAliasesList());
  component.setAdditionalsecretoutputsList(request.getAdditionalsecretoutputsList());
  component.setIgnorechangesList(request.getIgnorechangesList());
  component.setReplaceonchangesList(request.getReplaceonchangesList());
  component.setReplaceWithList(request.getReplaceWithList());
  component.setReplacementTrigger(request.getReplacementTrigger());
  component.setDeletebeforereplacedefined(request.hasDeletebeforereplace());
  component.setDeletebeforereplace(request.getDeletebeforereplace() ?? false);
  // The same fields by the same numbers.
  const { CustomTimeouts, ResourceHooksBinding } = resourceProto.RegisterResourceRequest;
  const [timeouts, hooks] = [request.getCustomtimeouts(), request.getResourceHooks()];
  if (timeouts) component.setCustomtimeouts(CustomTimeouts.deserializeBinary(timeouts.serializeBinary()));
  if (hooks) component.setHooks(ResourceHooksBinding.deserializeBinary(hooks.serializeBinary()));
  request.getProvidersMap().forEach((provider, name) => {
    component.getProvidersMap().set(name, provider);
  });
  return component;
}

function partRequest(
  request: Request,
  { version }: Door,
  parent: string,
  { type, name }: Part,
  { values, dependencies }: Sent,
): resourceProto.RegisterResourceRequest {
  const part = registration(request, pluginToken(type), name, parent);
  part.setCustom(true);
  part.setVersion(version);
  // What a program's own component made as a dynamic resource is this one.
  const before = new aliasProto.Alias();
  before.setSpec(new aliasProto.Alias.Spec().setType(dynamicToken(type)));
  part.setAliasesList([before]);
  part.setProvider(request.getProvidersMap().get("lvm-nbd") ?? "");
  part.setObject(values);
  part.setDependenciesList([...new Set([...dependencies.values()].flat())]);
  for (const [key, urns] of dependencies) {
    const ofProperty = new resourceProto.RegisterResourceRequest.PropertyDependencies();
    ofProperty.setUrnsList([...urns]);
    part.getPropertydependenciesMap().set(key, ofProperty);
  }
  return part;
}

/** What component and parts have in common: what protects the one is to protect the others. */
function registration(
  request: Request,
  type: string,
  name: string,
  parent: string,
): resourceProto.RegisterResourceRequest {
  const registered = new resourceProto.RegisterResourceRequest();
  registered.setType(type);
  registered.setName(name);
  registered.setParent(parent);
  // What is not said is the parent's, and reads as false.
  if (request.hasProtect()) registered.setProtect(request.getProtect() ?? false);
  if (request.hasRetainondelete()) registered.setRetainondelete(request.getRetainondelete() ?? false);
  registered.setDeletedwith(request.getDeletedwith());
  registered.setParentstacktracehandle(request.getStackTraceHandle());
  registered.setAcceptsecrets(true);
  registered.setAcceptresources(true);
  registered.setAliasspecs(true);
  registered.setSupportspartialvalues(true);
  // A part that failed is told of by the engine, and the others go on where it says so (`--continue-on-error`).
  registered.setSupportsresultreporting(true);
  return registered;
}
