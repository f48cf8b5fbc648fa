// Rotary embedding on a CPU, with storing: the heads of q and k turned, k and v put into their slots of the cache. The
// products of a rotation and their sum are rounded where torch rounds.
//
// Legend: T tokens, N query heads, K key/value heads, J = N + 2 K, D head size, E half of what is turned of a head, M
// slots of the cache.

#include <cstring>

#include "vectors.h"

namespace {

constexpr long LEAST = 1 << 14;  // values that a second thread is worth

struct Head {
    const Scalar *cos, *sin;  // [E]
    long D, E;

    // Elements E apart are turned together; those behind stay.
    void turn(const Scalar* from, Scalar* to) const {
        each(E, [&](long at, auto there) {
            const Wide c = load(cos + at, there), s = load(sin + at, there);
            const Wide one = load(from + at, there), two = load(from + E + at, there);
            store(to + at, as_stored(one * c) - as_stored(two * s), there);
            store(to + E + at, as_stored(two * c) + as_stored(one * s), there);
        });
        std::memcpy(to + 2 * E, from + 2 * E, (D - 2 * E) * sizeof(Scalar));
    }
};

}  // namespace

// qkv [T, J, D], cos, sin [T, E], k, v [M, K, D], slots [T], q [T, N, D].
extern "C" void run(const Scalar* qkv, const Scalar* cos, const Scalar* sin, Scalar* k, Scalar* v, const int64_t* slots,
                    Scalar* q, int64_t T, int64_t N, int64_t K, int64_t D, int64_t E) {
    const long J = N + 2 * K;
#pragma omp parallel for schedule(static) if (T * J * D >= LEAST)
    for (long token = 0; token < T; token++) {
        const Scalar* from = qkv + token * J * D;
        const Head head{cos + token * E, sin + token * E, D, E};
        for (long n = 0; n < N; n++) head.turn(from + n * D, q + (token * N + n) * D);
        for (long n = 0; n < K; n++) head.turn(from + (N + n) * D, k + (slots[token] * K + n) * D);
        std::memcpy(v + slots[token] * K * D, from + (N + K) * D, K * D * sizeof(Scalar));
    }
}
