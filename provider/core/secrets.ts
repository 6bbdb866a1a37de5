/** Properties whose values are encrypted in the state, wherever they stand, whether or not a program marked them as secrets. */
const secretNames = new Set(["privateKey", "passphrase", "password", "clientPrivateKey", "tls", "clientTls"]);

/** True for a value that nobody may read. That something has keys of its own (`tls: true`) is no secret. */
export function isSecret(property: string, value: unknown): boolean {
  return secretNames.has(property) && value !== undefined && value !== null && typeof value !== "boolean";
}
