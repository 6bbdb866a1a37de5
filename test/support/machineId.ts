/** The machine-id(5) of all stand-ins for hosts. */
export const machineId = "0123456789abcdef0123456789abcdef";
