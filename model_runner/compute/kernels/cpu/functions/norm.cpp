// The plain RMSNorm on a CPU with what it is added to: total = residual + x, normed = weight * (total / rms), each
// rounded where torch rounds.
//
// Legend: T tokens, H hidden size.

#include <cmath>

#include "vectors.h"

namespace {

constexpr long LEAST = 1 << 14;  // values that a second thread is worth

// Gives the sum of squares.
float add(const Scalar* x, const Scalar* residual, Scalar* total, long H) {
    Wide squares = {};
    each(H, [&](long at, auto there) {
        const Wide some = as_stored(load(residual + at, there) + load(x + at, there));
        store(total + at, some, there);
        squares += some * some;
    });
    return fold(squares, [](Wide one, Wide other) { return one + other; })[0];
}

void norm(const Scalar* total, const Scalar* weight, Scalar* normed, long H, float factor) {
    each(H, [&](long at, auto there) {
        store(normed + at, load(weight + at, there) * as_stored(load(total + at, there) * factor), there);
    });
}

}  // namespace

// x, residual, normed, total [T, H], weight [H].
extern "C" void run(const Scalar* x, const Scalar* residual, const Scalar* weight, Scalar* normed, Scalar* total,
                    int64_t T, int64_t H, float eps) {
#pragma omp parallel for schedule(static) if (T * H >= LEAST)
    for (long at = 0; at < T * H; at += H) {
        const float squares = add(x + at, residual + at, total + at, H);
        norm(total + at, weight, normed + at, H, 1 / std::sqrt(squares / H + eps));
    }
}
