// The SiLU gate of an MLP on a CPU: silu(gate), rounded as torch rounds it, times up.
//
// Legend: T tokens, I inner size.

#include <algorithm>

#include "vectors.h"

namespace {

constexpr long TASK_VALUES = 2048;      // the most values of a task, which is within one row
constexpr long PARALLEL_MIN = 1 << 15;  // values from which several threads are used

void silu_mul(const Scalar* gate, const Scalar* up, Scalar* out, long values) {
    for_each_vector(values, [&](long at, auto count) {
        const Vector given = load(gate + at, count), x = given < -88.0f ? -88.0f - Vector{} : given;  // silu is 0 below
        store(out + at, round_as_stored(x / (1.0f + exp(-x))) * load(up + at, count), count);
    });
}

}  // namespace

// gate_up [T, 2 I], out [T, I].
extern "C" void run(const Scalar* gate_up, Scalar* out, int64_t T, int64_t I) {
    const long tasks = (I + TASK_VALUES - 1) / TASK_VALUES;  // tasks per row
#pragma omp parallel for schedule(static) if (T * I >= PARALLEL_MIN)
    for (long task = 0; task < T * tasks; task++) {
        const long row = task / tasks, begin = task % tasks * TASK_VALUES;
        const Scalar* gate = gate_up + row * 2 * I + begin;
        silu_mul(gate, gate + I, out + row * I + begin, std::min(TASK_VALUES, I - begin));
    }
}
