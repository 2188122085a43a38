// The kernels for x86-64 with AVX2. The pragma stays in force to the end of the file, where templates are instantiated.
#include "group_norm.h"
#include "attention.h"
#include "matching.h"
#include "pixels.h"
#include "points.h"
#include "problem.h"
#include "products.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define MASK2FORMER_VECTOR_BYTES 32
#define MASK2FORMER_KERNELS kernels_avx2
#define MASK2FORMER_POINT_KERNELS point_kernels_avx2
#define MASK2FORMER_PIXEL_KERNELS pixel_kernels_avx2
#define MASK2FORMER_GROUP_NORM_KERNELS group_norm_kernels_avx2
#define MASK2FORMER_PRODUCT_KERNELS product_kernels_avx2
#define MASK2FORMER_MATCHING_KERNELS matching_kernels_avx2
#define MASK2FORMER_ATTENTION_KERNELS attention_kernels_avx2
#include "kernel.h"
#include "points_kernel.h"
#include "tile_kernel.h"
#include "pixels_kernel.h"
#include "matching_kernel.h"
#include "attention_kernel.h"
#include "products_kernel.h"
#include "group_norm_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
