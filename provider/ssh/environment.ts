/** What OpenSSH's programs are given: not the stack's configuration with its secrets in clear, which Pulumi gives a program. */
export function childEnvironment(): NodeJS.ProcessEnv {
  const { PULUMI_CONFIG: _config, PULUMI_CONFIG_SECRET_KEYS: _keys, ...rest } = process.env;
  return rest;
}
