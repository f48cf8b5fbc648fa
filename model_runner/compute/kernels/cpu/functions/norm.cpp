// The residual addition and the plain RMSNorm on a CPU: total = residual + x, normed = weight * (total / rms), both
// rounded where torch rounds.
//
// Legend: T tokens, H hidden size.

#include <cmath>

#include "vectors.h"

namespace {

constexpr long PARALLEL_MIN = 1 << 14;  // values from which several threads are used

// Writes residual + x to total. Returns the sum of the squares of total.
float add(const Scalar* x, const Scalar* residual, Scalar* total, long H) {
    Vector squares = {};
    for_each_vector(H, [&](long at, auto count) {
        const Vector value = round_as_stored(load(residual + at, count) + load(x + at, count));
        store(total + at, value, count);
        squares += value * value;
    });
    return reduce(squares, [](Vector one, Vector two) { return one + two; })[0];
}

void norm(const Scalar* total, const Scalar* weight, Scalar* normed, long H, float factor) {
    for_each_vector(H, [&](long at, auto count) {
        store(normed + at, load(weight + at, count) * round_as_stored(load(total + at, count) * factor), count);
    });
}

}  // namespace

// x, residual, normed, total [T, H], weight [H].
extern "C" void run(const Scalar* x, const Scalar* residual, const Scalar* weight, Scalar* normed, Scalar* total,
                    int64_t T, int64_t H, float eps) {
#pragma omp parallel for schedule(static) if (T * H >= PARALLEL_MIN)
    for (long at = 0; at < T * H; at += H) {
        const float squares = add(x + at, residual + at, total + at, H);
        norm(total + at, weight, normed + at, H, 1 / std::sqrt(squares / H + eps));
    }
}
