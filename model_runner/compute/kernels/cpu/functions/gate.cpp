// The SiLU gate of an MLP on a CPU: silu(gate), rounded, times up.
//
// Legend: T tokens, I inner size.

#include <algorithm>

#include "vectors.h"

namespace {

constexpr long PIECE = 2048;     // values of a task, of one row
constexpr long LEAST = 1 << 15;  // values that a second thread is worth

void piece(const Scalar* gate, const Scalar* up, Scalar* out, long values) {
    each(values, [&](long at, auto there) {
        const Wide given = load(gate + at, there), x = given < -88.0f ? -88.0f - Wide{} : given;  // below it is nothing
        store(out + at, as_stored(x / (1.0f + power(-x))) * load(up + at, there), there);
    });
}

}  // namespace

// gate_up [T, 2 I], out [T, I].
extern "C" void run(const Scalar* gate_up, Scalar* out, int64_t T, int64_t I) {
    const long pieces = (I + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) if (T * I >= LEAST)
    for (long task = 0; task < T * pieces; task++) {
        const long row = task / pieces, begin = task % pieces * PIECE;
        const Scalar* gate = gate_up + row * 2 * I + begin;
        piece(gate, gate + I, out + row * I + begin, std::min(PIECE, I - begin));
    }
}
