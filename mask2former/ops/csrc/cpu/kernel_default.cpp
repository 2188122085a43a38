// The kernels for what every processor of the architecture has.
#include "problem.h"

#define MASK2FORMER_VECTOR_BYTES 16
#define MASK2FORMER_KERNELS kernels_default
#include "kernel.h"
