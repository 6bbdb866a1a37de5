/** What a program asks of hosts in its own process, before it declares anything. Each question closes its connections: the program ends. */
import * as pulumi from "@pulumi/pulumi";
import { type Image, listImages as listImagesOf } from "../backup/listImages.js";
import { LvmNbdError } from "../core/errors.js";
import { type AnyFunctionType, askFunction } from "../core/functions.js";
import { type GetHostArgs, type GetHostResult, getHost as getHostType } from "../functions/getHost.js";
import {
  type GetVolumesArgs,
  type GetVolumesResult,
  getVolumes as getVolumesType,
} from "../functions/getVolumes.js";
import { createHostPool } from "../ssh/pool.js";
import type { HostArgs } from "../ssh/types.js";
import { configuredHosts } from "./stackConfiguration.js";

/**
 * What images are in a folder of a host, the newest first: for a program to loop over, and for `generations` to
 * choose from. Files without a manifest of this package are passed over, manifests whose image is gone too, and folders.
 *
 * @param host - as the `host` of a resource
 * @param folder - absolute path
 * @throws LvmNbdError of the codes of a host that cannot be reached, DIRECTORY_NOT_FOUND, and FILE_UNSUITABLE for a folder that others
 *   than root can change: never an empty list where it cannot be told
 */
export async function listImages(host: HostArgs, folder: string): Promise<Image[]> {
  return listImagesOf(host, folder, configuredHosts());
}

/**
 * Which logical volumes a host has: for a program to loop over, e.g. over the disks of its virtual machines. It only looks.
 *
 * @throws LvmNbdError of the codes of a host that cannot be reached, and VOLUME_GROUP_NOT_FOUND: never an empty list where it cannot
 *   be told
 */
export async function getVolumes(args: GetVolumesArgs): Promise<GetVolumesResult> {
  return ask<GetVolumesResult>(getVolumesType, args);
}

/**
 * What a host is: its system, and the versions of the tools that are there. It only looks.
 *
 * @throws LvmNbdError of the codes of a host that cannot be reached
 */
export async function getHost(args: GetHostArgs): Promise<GetHostResult> {
  return ask<GetHostResult>(getHostType, args);
}

async function ask<Result>(type: AnyFunctionType, args: object): Promise<Result> {
  const named = configuredHosts();
  const pool = createHostPool();
  try {
    const answer = await askFunction(
      type,
      { ...args },
      {
        openHost: (host) => pool.get(host, named),
        namedHosts: () => named,
        progress: () => undefined,
        warn: (message) => pulumi.log.warn(message),
        signal: new AbortController().signal,
      },
    );
    if (answer.problems === undefined) return answer.values as Result;
    const reasons = answer.problems.map(({ property, reason }) => `${property}: ${reason}`);
    throw new LvmNbdError("INVALID_INPUT", { message: `${type.name}: ${reasons.join("; ")}` });
  } finally {
    pool.close();
  }
}
