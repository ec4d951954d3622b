#include "cpu/divergence.h"

#define SK_ONLY 64
#define SK_KERNEL "cpu/divergence_kernel.h"
#include "cpu/foreach_isa.h"
