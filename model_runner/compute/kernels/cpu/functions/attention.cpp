// Causal attention on a CPU over the slots that each row sees, where they lie in the cache: decodes and prefills alike.
//
//   a task is some tokens of a row and a key/value head, with the G query heads that share it: Q queries
//     scores     16 keys at a time, turned, so that a vector is of 16 slots    [Q, L]
//     softmax    in float32; the shares are rounded to the cache's dtype
//     values     two slots at a time (pairs), or one, summed in float32        [Q, D]
//
// No row's slots are gathered, padded or looked at by another row, and a token's bits do not depend on its company.
// Compiled with BFLOAT16 or without, for float32.
//
// Legend: C rows, T tokens, L slots that a task sees, N query heads, K key/value heads, G = N / K, D head size, a
// multiple of WIDTH * STEP.

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int SCORED = 8;        // queries whose scores are computed together
constexpr int WEIGHED = 4;       // queries that go through the values together
constexpr long TOKENS = 16;      // of a task, at most
constexpr long ROOM = 1 << 21;   // scores of a task of several tokens, at most
constexpr long AHEAD = 16;       // slots
constexpr long BLOCK = 64;       // slots whose values are read together
constexpr long LEAST = 1 << 19;  // multiplications that a second thread is worth

inline long up(long value, long multiple) { return (value + multiple - 1) / multiple * multiple; }

const Wide PLACES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct Cache {
    const Scalar *k, *v;  // [M, K, D]
    long K, D;
    const Scalar* key(long slot, long head) const { return k + (slot * K + head) * D; }
    const Scalar* value(long slot, long head) const { return v + (slot * K + head) * D; }
};

struct Row {
    const int64_t* slots;
    long seen, token, tokens;  // how many slots its last token sees; where its tokens begin, and how many they are
};

struct Task {
    Row row;
    long head, begin, end;  // of the row's tokens
    long seen(long token) const { return row.seen - row.tokens + token + 1; }
    long most() const { return seen(end - 1); }
};

// Queries side by side: token after token, the G heads of each. What one of them sees, and where it lies in q and out.
struct Query {
    long seen, at;
};

// One thread's room.
struct Desk {
    std::vector<Query> queries;
    std::vector<float> scores;   // [Q, L rounded up]
    std::vector<Scalar> shares;  // the same, normed
    std::vector<Wide> keys;      // [D / STEP] of 16 slots each
    std::vector<Wide> values;    // of BLOCK slots
    std::vector<Wide> sums;      // [Q, D / WIDTH]
};

inline void fetch(const Scalar* from, long values) {
    for (long at = 0; at < values; at += 64 / long(sizeof(Scalar))) __builtin_prefetch(from + at);
}

// 16 slots' keys from `first` on, step by step; those beyond the last that is seen are the last one's.
void turn(const Cache& cache, const Task& task, long first, Wide* keys) {
    const int64_t* slots = task.row.slots;
    const long head = task.head, seen = task.most();
    const Scalar* from[WIDTH];
    for (long j = 0; j < WIDTH; j++) from[j] = cache.key(slots[std::min(first + j, seen - 1)], head);
    for (long j = first; j < std::min(first + WIDTH, seen); j++) {  // what is wanted soon is on its way
        fetch(cache.key(slots[std::min(j + AHEAD, seen - 1)], head), cache.D);
        fetch(cache.value(slots[j], head), cache.D);
    }
    for (long d = 0; d < cache.D; d += WIDTH * STEP) {
        Wide rows[WIDTH];
#pragma GCC unroll 16
        for (long j = 0; j < WIDTH; j++) rows[j] = load_steps(from[j] + d);
#pragma GCC unroll 4
        for (int step = 1; step < WIDTH; step *= 2)
#pragma GCC unroll 16
            for (int j = 0; j < WIDTH; j++)
                if (!(j & step)) part(rows[j], rows[j + step], step);
#pragma GCC unroll 16
        for (long j = 0; j < WIDTH; j++) keys[d / STEP + j] = rows[j];
    }
}

// 16 scores of each of H queries.
template <int H>
void score(const Wide* keys, long D, const Scalar* q, const Query* queries, float scale, float* scores, long room) {
    Wide acc[H] = {};
    const Scalar* from[H];
    for (int g = 0; g < H; g++) from[g] = q + queries[g].at;
    for (long d = 0; d < D; d += STEP)
        for (int g = 0; g < H; g++) acc[g] = add_products(acc[g], keys[d / STEP], spread(from[g] + d));
#pragma GCC unroll 8
    for (int g = 0; g < H; g++) store(scores + g * room, acc[g] * scale);
}

constexpr decltype(&score<1>) SCORE[] = {score<1>, score<2>, score<3>, score<4>,
                                         score<5>, score<6>, score<7>, score<8>};

// The scores of a task, block by block of keys, of the queries that see any of them.
void score_all(Desk& desk, const Cache& cache, const Task& task, const Scalar* q, float scale, long room) {
    const long Q = desk.queries.size();
    long from = 0;
    for (long first = 0; first < task.most(); first += WIDTH) {
        turn(cache, task, first, desk.keys.data());
        while (desk.queries[from].seen <= first) from++;
        for (long at = from; at < Q; at += SCORED)
            SCORE[std::min<long>(SCORED, Q - at) - 1](desk.keys.data(), cache.D, q, &desk.queries[at], scale,
                                                      desk.scores.data() + at * room + first, room);
    }
}

// What is within `seen` of a vector that begins at `at`, and `other` behind.
inline Wide within(Wide value, long at, long seen, float other) {
    return at + WIDTH <= seen ? value : PLACES < float(seen - at) ? value : other - Wide{};
}

// Scores to shares of one query that sees so many of `room` slots: the others' shares are nothing.
void soften(float* scores, Scalar* shares, long seen, long room) {
    Wide high = -3e38f - Wide{}, total = {};
    for (long at = 0; at < seen; at += WIDTH) {
        const Wide some = within(load(scores + at), at, seen, -3e38f);
        high = some > high ? some : high;
    }
    const Wide top = fold(high, [](Wide one, Wide other) { return one > other ? one : other; });
    for (long at = 0; at < seen; at += WIDTH) {
        const Wide x = load(scores + at) - top, some = within(x == x ? power(x) : x, at, seen, 0);
        store(scores + at, some);
        total += some;
    }
    const Wide share = 1.0f / fold(total, [](Wide one, Wide other) { return one + other; });
    for (long at = 0; at < seen; at += WIDTH) store(shares + at, load(scores + at) * share);
    for (long at = up(seen, WIDTH); at < room; at += WIDTH) store(shares + at, Wide{});
}

// Adds up to BLOCK slots' values, times their shares, to H queries' sums; V vectors of a query at a time.
template <int H, int V>
void add_values(const Wide* values, long width, long steps, const Scalar* shares, long room, Wide* sums) {
    for (long d = 0; d < width; d += V) {
        Wide acc[H][V];
        for (int g = 0; g < H; g++)
            for (int i = 0; i < V; i++) acc[g][i] = sums[g * width + d + i];
        for (long step = 0; step < steps; step++)
            for (int g = 0; g < H; g++) {
                const Wide share = spread(shares + g * room + step * STEP);
                for (int i = 0; i < V; i++) acc[g][i] = add_products(acc[g][i], share, values[step * width + d + i]);
            }
#pragma GCC unroll 4
        for (int g = 0; g < H; g++)
#pragma GCC unroll 4
            for (int i = 0; i < V; i++) sums[g * width + d + i] = acc[g][i];
    }
}

template <int V> constexpr decltype(&add_values<1, V>) ADD[] = {add_values<1, V>, add_values<2, V>, add_values<3, V>,
                                                                add_values<4, V>};

// Two slots' values at a time, or one: from `first` on, of `steps` such steps.
void read_values(Desk& desk, const Cache& cache, const Task& task, long first, long steps) {
    const long width = cache.D / WIDTH, last = task.most() - 1;
    for (long step = 0; step < steps; step++) {
        const long one = first + step * STEP, below = std::min(one + STEP - 1, last);
        const Scalar* upper = cache.value(task.row.slots[one], task.head);
        const Scalar* lower = cache.value(task.row.slots[below], task.head);
        for (long d = 0; d < width; d++)
            desk.values[step * width + d] = load_column(upper + d * WIDTH, lower + d * WIDTH);
    }
}

void weigh(Desk& desk, const Cache& cache, const Task& task, long room, Scalar* out) {
    const long width = cache.D / WIDTH, Q = desk.queries.size();
    desk.values.resize(BLOCK / STEP * width);
    desk.sums.assign(Q * width, Wide{});
    long from = 0;
    for (long first = 0; first < task.most(); first += BLOCK) {
        read_values(desk, cache, task, first, up(std::min(BLOCK, task.most() - first), STEP) / STEP);
        while (desk.queries[from].seen <= first) from++;
        for (long at = from; at < Q; at += WEIGHED) {
            const long more = std::min<long>(WEIGHED, Q - at) - 1, seen = desk.queries[at + more].seen;
            (width % 4 ? ADD<1> : ADD<4>)[more](desk.values.data(), width,
                                                up(std::min(BLOCK, seen - first), STEP) / STEP,
                                                desk.shares.data() + at * room + first, room,
                                                desk.sums.data() + at * width);
        }
    }
    for (long at = 0; at < Q; at++)
        for (long d = 0; d < width; d++) store(out + desk.queries[at].at + d * WIDTH, desk.sums[at * width + d]);
}

struct Shape {
    long N, K, D, C;
    long heads() const { return N / K; }
};

// The tasks of a plan, those of many tokens and of the last ones first. Gives how many multiplications they are.
long read_plan(const Shape& shape, const int64_t* plan, std::vector<Task>& tasks) {
    const int64_t *firsts = plan + 1, *lengths = firsts + shape.C, *stops = lengths + shape.C, *slots = stops + shape.C;
    long work = 0;
    tasks.clear();
    for (long at = 0; at < shape.C; at++) {
        const long begin = at ? stops[at - 1] : 0, seen = stops[at] - begin, tokens = lengths[at];
        const Row row{slots + begin, seen, firsts[at], tokens};
        const long some = std::clamp(ROOM / (shape.heads() * seen), 1L, TOKENS);
        for (long end = tokens; end > 0; end -= some)
            for (long head = 0; head < shape.K; head++) tasks.push_back({row, head, std::max(0L, end - some), end});
        work += tokens * seen * shape.N * shape.D;
    }
    std::stable_partition(tasks.begin(), tasks.end(), [](const Task& task) { return task.row.tokens > 1; });
    return work;
}

void attend(Desk& desk, const Shape& shape, const Cache& cache, const Task& task, const Scalar* q, float scale,
            Scalar* out) {
    const long G = shape.heads(), room = up(task.most(), WIDTH);
    desk.queries.clear();
    for (long token = task.begin; token < task.end; token++)
        for (long g = 0; g < G; g++)
            desk.queries.push_back(
                {task.seen(token), ((task.row.token + token) * shape.N + task.head * G + g) * shape.D});
    const long Q = desk.queries.size();
    desk.scores.resize(Q * room), desk.shares.resize(Q * room), desk.keys.resize(shape.D / STEP);
    score_all(desk, cache, task, q, scale, room);
    for (long at = 0; at < Q; at++)
        soften(desk.scores.data() + at * room, desk.shares.data() + at * room, desk.queries[at].seen, room);
    weigh(desk, cache, task, room, out);
}

}  // namespace

// q, out [T, N, D], k, v [M, K, D], plan [C, the rows' first tokens, how many each has, where each one's slots end, then
// the slots, row after row]. A row's last token sees all of its slots.
extern "C" void run(const Scalar* q, const Scalar* k, const Scalar* v, Scalar* out, const int64_t* plan, int64_t N,
                    int64_t K, int64_t D, float scale) {
    const Shape shape{N, K, D, plan[0]};
    const Cache cache{k, v, K, D};
    static thread_local std::vector<Task> own_tasks;
    const long work = read_plan(shape, plan, own_tasks);
    const std::vector<Task>& tasks = own_tasks;  // the calling thread's, for all
#pragma omp parallel if (work >= LEAST)
    {
        static thread_local Desk own;
        Desk& desk = own;
#pragma omp for schedule(dynamic, 1)
        for (size_t task = 0; task < tasks.size(); task++) attend(desk, shape, cache, tasks[task], q, scale, out);
    }
}
