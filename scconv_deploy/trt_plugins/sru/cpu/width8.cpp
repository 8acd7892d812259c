// Vectors of 8 floats: AVX2 and F16C.
#define SCCONV_LANES 8
#include "width.h"
