/* Any processor: vectors of four floats, which every compiler can map onto what it has. */
#define LANES 4
#define TABLE vision_kernels_generic
#include "kernels.h"
