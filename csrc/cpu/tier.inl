// The kernels of one tier; compiled once per instruction set, with TIER naming the result. No header of the standard
// library with inline functions may be included here: the linker would keep one copy for all tiers.

#include "cpu/packing.inl"
#include "cpu/pairs.inl"

namespace sphere {

// Constants, so that loading the module runs no code of a tier that the machine lacks.
template <class T>
static constexpr Kernels<T> kernels_of_tier = {LANES<T>,        row_norms<T>,  read_row<T>,    pack<T>,
                                               tile_product<T>, store_tile<T>, energy_tile<T>, slopes_tile<T>,
                                               cosine_tile<T>,  update_tile<T>};

extern const Kernels<float> TIER_KERNELS(float);
extern const Kernels<double> TIER_KERNELS(double);
constexpr Kernels<float> TIER_KERNELS(float) = kernels_of_tier<float>;
constexpr Kernels<double> TIER_KERNELS(double) = kernels_of_tier<double>;

}  // namespace sphere
