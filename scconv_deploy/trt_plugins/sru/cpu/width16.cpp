// Vectors of 16 floats: AVX-512.
#define SCCONV_LANES 16
#include "width.h"
