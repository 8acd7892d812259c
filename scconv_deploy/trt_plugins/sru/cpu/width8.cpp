// Vectors of 8 floats: AVX2, FMA and F16C.
#define SCCONV_LANES 8
#include "width.h"
