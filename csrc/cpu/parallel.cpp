#include "cpu/parallel.h"

#if defined(_OPENMP) && !defined(_WIN32)
#include <pthread.h>
#endif

namespace sphere {

#if defined(_OPENMP) && !defined(_WIN32)

namespace {

bool forked = false;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int usable_threads(int asked) { return forked || asked < 1 ? 1 : asked; }

#else

int usable_threads(int asked) { return asked < 1 ? 1 : asked; }

#endif

}  // namespace sphere
