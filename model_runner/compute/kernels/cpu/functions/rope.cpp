// Rotary embedding and the KV store on a CPU: rotates the heads of q and k, stores k and v at their slots of the cache.
// Each product of a rotation and their sum are rounded where torch rounds.
//
// Legend: T tokens, N query heads, K key/value heads, J = N + 2 K, D head size, E half of the rotated elements of a
// head, M slots of the cache.

#include <cstring>

#include "vectors.h"

namespace {

constexpr long PARALLEL_MIN = 1 << 14;  // values from which several threads are used

// The rotation of the heads of one token.
struct Rotation {
    const Scalar *cos, *sin;  // [E]
    long D, E;

    // Rotates elements i and i + E of a head together; copies the elements from 2 E on.
    void rotate(const Scalar* from, Scalar* to) const {
        for_each_vector(E, [&](long at, auto count) {
            const Vector c = load(cos + at, count), s = load(sin + at, count);
            const Vector one = load(from + at, count), two = load(from + E + at, count);
            store(to + at, round_as_stored(one * c) - round_as_stored(two * s), count);
            store(to + E + at, round_as_stored(two * c) + round_as_stored(one * s), count);
        });
        std::memcpy(to + 2 * E, from + 2 * E, (D - 2 * E) * sizeof(Scalar));
    }
};

}  // namespace

// qkv [T, J, D], cos, sin [T, E], k, v [M, K, D], slots [T], q [T, N, D].
extern "C" void run(const Scalar* qkv, const Scalar* cos, const Scalar* sin, Scalar* k, Scalar* v, const int64_t* slots,
                    Scalar* q, int64_t T, int64_t N, int64_t K, int64_t D, int64_t E) {
    const long J = N + 2 * K;
#pragma omp parallel for schedule(static) if (T * J * D >= PARALLEL_MIN)
    for (long token = 0; token < T; token++) {
        const Scalar* from = qkv + token * J * D;
        const Rotation rotation{cos + token * E, sin + token * E, D, E};
        for (long n = 0; n < N; n++) rotation.rotate(from + n * D, q + (token * N + n) * D);
        for (long n = 0; n < K; n++) rotation.rotate(from + (N + n) * D, k + (slots[token] * K + n) * D);
        std::memcpy(v + slots[token] * K * D, from + (N + K) * D, K * D * sizeof(Scalar));
    }
}
