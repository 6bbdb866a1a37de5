/**
 * What is serialised into the state as `__provider`: these few lines and the type's name, nothing else. They
 * must not change between versions, or every resource of every stack would show a change.
 */
import type * as pulumi from "@pulumi/pulumi";

/** The provider object of a dynamic resource. Every method hands over to the installed package. */
export function thinProvider(type: string): pulumi.dynamic.ResourceProvider {
  return {
    configure: (request) => require("pulumi-lvm-nbd/runtime").configure(request),
    check: (olds, news) => require("pulumi-lvm-nbd/runtime").handlers(type).check(olds, news),
    diff: (id, olds, news) => require("pulumi-lvm-nbd/runtime").handlers(type).diff(id, olds, news),
    create: (inputs) => require("pulumi-lvm-nbd/runtime").handlers(type).create(inputs),
    read: (id, props) => require("pulumi-lvm-nbd/runtime").handlers(type).read(id, props),
    update: (id, olds, news) => require("pulumi-lvm-nbd/runtime").handlers(type).update(id, olds, news),
    delete: (id, props) => require("pulumi-lvm-nbd/runtime").handlers(type).delete(id, props),
  };
}
