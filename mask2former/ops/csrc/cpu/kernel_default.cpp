// The kernels for what every processor of the architecture has.
#include "matching.h"
#include "points.h"
#include "problem.h"

#define MASK2FORMER_VECTOR_BYTES 16
#define MASK2FORMER_KERNELS kernels_default
#define MASK2FORMER_POINT_KERNELS point_kernels_default
#define MASK2FORMER_MATCHING_KERNELS matching_kernels_default
#include "kernel.h"
#include "points_kernel.h"
#include "matching_kernel.h"
