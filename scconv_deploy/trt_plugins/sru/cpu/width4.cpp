// Vectors of 4 floats: what every processor of the architecture has: SSE2, NEON.
#define SCCONV_LANES 4
#include "width.h"
