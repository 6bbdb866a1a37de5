/** Writes the examples that are one program in several languages. */
import { examplePrograms } from "./examplePrograms.mts";
import { writeGenerated } from "./generated.mts";

for (const [path, text] of Object.entries(examplePrograms)) writeGenerated(path, text, "npm run examples");
