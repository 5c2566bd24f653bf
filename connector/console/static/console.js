// Starts the parts of the page.

import { startDead } from "./dead.js";
import { startLetters } from "./letters.js";
import { startSearch } from "./messages.js";
import { follow } from "./pipeline.js";
import { startProof } from "./proof.js";
import { startRedrive } from "./redrive.js";

startRedrive();
startSearch();
follow();
startDead();
startLetters();
startProof();
