// Causal attention on a CPU, reading each row's K and V from its slots of the cache, for decodes and prefills alike.
//
//   a task computes some tokens of a row for one key/value head and the G query heads that share it: Q queries
//     scores     of 16 keys at a time, transposed so that a vector has 16 slots      [Q, L]
//     softmax    in float32; the weights are rounded to the cache's dtype
//     values     STEP slots at a time, summed in float32                             [Q, D]
//
// Nothing is gathered or padded, no row reads another row's slots, and a token's result does not depend on the batch.
// Compiled for bfloat16 if BFLOAT16 is defined, else for float32.
//
// Legend: C rows, T tokens, L slots that a task sees, N query heads, K key/value heads, G = N / K, D head size, a
// multiple of WIDTH * STEP.

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int SCORE_QUERIES = 8;        // queries whose scores are computed together
constexpr int VALUE_QUERIES = 4;        // queries whose values are summed together
constexpr long TASK_TOKENS = 16;        // the most tokens of a task
constexpr long TASK_SCORES = 1 << 21;   // the most scores of a task of several tokens
constexpr long PREFETCH_SLOTS = 16;     // how far ahead keys are prefetched
constexpr long VALUE_SLOTS = 64;        // slots whose values are loaded together
constexpr long PARALLEL_MIN = 1 << 19;  // multiplications from which several threads are used
constexpr float MASKED_SCORE = -3e38f;

inline long round_up(long value, long multiple) { return (value + multiple - 1) / multiple * multiple; }

const Vector INDICES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct Cache {
    const Scalar *k, *v;  // [M, K, D]
    long K, D;
    const Scalar* key(long slot, long head) const { return k + (slot * K + head) * D; }
    const Scalar* value(long slot, long head) const { return v + (slot * K + head) * D; }
};

struct Row {
    const int64_t* slots;
    long seen, first, tokens;  // slots that the last token sees, the first token's index in the batch, tokens in all
};

struct Task {
    Row row;
    long head, begin, end;  // a key/value head, and the range of the row's tokens
    long seen(long token) const { return row.seen - row.tokens + token + 1; }
    long most_seen() const { return seen(end - 1); }
};

// One query head of one token; a task has its G heads of the first token, then those of the next one, ...
struct Query {
    long seen, offset;  // the number of slots that the query sees, its offset in q and out
};

// The working memory of one thread.
struct Scratch {
    std::vector<Query> queries;
    std::vector<float> scores;    // [Q, L rounded up]; later their exponentials
    std::vector<Scalar> weights;  // [Q, L rounded up], the softmax of the scores
    std::vector<Vector> keys;     // [D / STEP] of 16 slots
    std::vector<Vector> values;   // [VALUE_SLOTS / STEP, D / WIDTH]
    std::vector<Vector> sums;     // [Q, D / WIDTH]
};

inline void prefetch(const Scalar* from, long values) {
    for (long at = 0; at < values; at += 64 / long(sizeof(Scalar))) __builtin_prefetch(from + at);
}

// Loads the keys of 16 slots from `first` on, transposed. The last slot that the task sees is repeated after it.
void load_transposed_keys(const Cache& cache, const Task& task, long first, Vector* keys) {
    const int64_t* slots = task.row.slots;
    const long head = task.head, seen = task.most_seen();
    const Scalar* from[WIDTH];
    for (long j = 0; j < WIDTH; j++) from[j] = cache.key(slots[std::min(first + j, seen - 1)], head);
    for (long j = first; j < std::min(first + WIDTH, seen); j++) {
        prefetch(cache.key(slots[std::min(j + PREFETCH_SLOTS, seen - 1)], head), cache.D);
        prefetch(cache.value(slots[j], head), cache.D);
    }
    for (long d = 0; d < cache.D; d += WIDTH * STEP) {
        Vector rows[WIDTH];
#pragma GCC unroll 16
        for (long j = 0; j < WIDTH; j++) rows[j] = load_steps(from[j] + d);
#pragma GCC unroll 4
        for (int step = 1; step < WIDTH; step *= 2)
#pragma GCC unroll 16
            for (int j = 0; j < WIDTH; j++)
                if (!(j & step)) transpose_step(rows[j], rows[j + step], step);
#pragma GCC unroll 16
        for (long j = 0; j < WIDTH; j++) keys[d / STEP + j] = rows[j];
    }
}

// Computes the scores of 16 slots for H queries; the scores of one query are `stride` apart from those of the next.
template <int H>
void score(const Vector* keys, long D, const Scalar* q, const Query* queries, float scale, float* scores, long stride) {
    Vector acc[H] = {};
    const Scalar* from[H];
    for (int g = 0; g < H; g++) from[g] = q + queries[g].offset;
    for (long d = 0; d < D; d += STEP)
        for (int g = 0; g < H; g++) acc[g] = multiply_add(acc[g], keys[d / STEP], broadcast(from[g] + d));
#pragma GCC unroll 8
    for (int g = 0; g < H; g++) store(scores + g * stride, acc[g] * scale);
}

constexpr decltype(&score<1>) SCORE[] = {score<1>, score<2>, score<3>, score<4>,
                                         score<5>, score<6>, score<7>, score<8>};

// Computes the scores of a task: for each block of 16 slots, the scores of the queries that see any of these slots.
void score_all(Scratch& scratch, const Cache& cache, const Task& task, const Scalar* q, float scale, long stride) {
    const long Q = scratch.queries.size();
    long from = 0;
    for (long first = 0; first < task.most_seen(); first += WIDTH) {
        load_transposed_keys(cache, task, first, scratch.keys.data());
        while (scratch.queries[from].seen <= first) from++;
        for (long at = from; at < Q; at += SCORE_QUERIES)
            SCORE[std::min<long>(SCORE_QUERIES, Q - at) - 1](scratch.keys.data(), cache.D, q, &scratch.queries[at],
                                                             scale, scratch.scores.data() + at * stride + first,
                                                             stride);
    }
}

// Returns the vector, whose elements have the indices `at`, `at` + 1, ..., with `masked` from index `seen` on.
inline Vector mask_unseen(Vector value, long at, long seen, float masked) {
    return at + WIDTH <= seen ? value : INDICES < float(seen - at) ? value : masked - Vector{};
}

// Writes the softmax of one query's `seen` scores to the weights, and 0 to the weights from there to `stride`.
void softmax(float* scores, Scalar* weights, long seen, long stride) {
    Vector high = MASKED_SCORE - Vector{}, total = {};
    for (long at = 0; at < seen; at += WIDTH) {
        const Vector x = mask_unseen(load(scores + at), at, seen, MASKED_SCORE);
        high = x > high ? x : high;
    }
    const Vector largest = reduce(high, [](Vector one, Vector two) { return one > two ? one : two; });
    for (long at = 0; at < seen; at += WIDTH) {
        const Vector x = load(scores + at) - largest;
        const Vector exponential = mask_unseen(x == x ? exp(x) : x, at, seen, 0);  // NaN stays NaN
        store(scores + at, exponential);
        total += exponential;
    }
    const Vector factor = 1.0f / reduce(total, [](Vector one, Vector two) { return one + two; });
    for (long at = 0; at < seen; at += WIDTH) store(weights + at, load(scores + at) * factor);
    for (long at = round_up(seen, WIDTH); at < stride; at += WIDTH) store(weights + at, Vector{});
}

// Adds the values of `steps` steps of STEP slots, times their weights, to the sums of H queries, V vectors at a time.
template <int H, int V>
void add_values(const Vector* values, long width, long steps, const Scalar* weights, long stride, Vector* sums) {
    for (long d = 0; d < width; d += V) {
        Vector acc[H][V];
        for (int g = 0; g < H; g++)
            for (int i = 0; i < V; i++) acc[g][i] = sums[g * width + d + i];
        for (long step = 0; step < steps; step++)
            for (int g = 0; g < H; g++) {
                const Vector weight = broadcast(weights + g * stride + step * STEP);
                for (int i = 0; i < V; i++) acc[g][i] = multiply_add(acc[g][i], weight, values[step * width + d + i]);
            }
#pragma GCC unroll 4
        for (int g = 0; g < H; g++)
#pragma GCC unroll 4
            for (int i = 0; i < V; i++) sums[g * width + d + i] = acc[g][i];
    }
}

template <int V> constexpr decltype(&add_values<1, V>) ADD_VALUES[] = {add_values<1, V>, add_values<2, V>,
                                                                       add_values<3, V>, add_values<4, V>};

// Loads the values of `steps` steps of STEP slots, from slot `first` on.
void load_values(Scratch& scratch, const Cache& cache, const Task& task, long first, long steps) {
    const long width = cache.D / WIDTH, last = task.most_seen() - 1;
    for (long step = 0; step < steps; step++) {
        const long slot = first + step * STEP, next = std::min(slot + STEP - 1, last);
        const Scalar* upper = cache.value(task.row.slots[slot], task.head);
        const Scalar* lower = cache.value(task.row.slots[next], task.head);
        for (long d = 0; d < width; d++)
            scratch.values[step * width + d] = load_rows(upper + d * WIDTH, lower + d * WIDTH);
    }
}

// Writes each query's sum of values times weights to `out`.
void sum_values(Scratch& scratch, const Cache& cache, const Task& task, long stride, Scalar* out) {
    const long width = cache.D / WIDTH, Q = scratch.queries.size();
    scratch.values.resize(VALUE_SLOTS / STEP * width);
    scratch.sums.assign(Q * width, Vector{});
    long from = 0;
    for (long first = 0; first < task.most_seen(); first += VALUE_SLOTS) {
        load_values(scratch, cache, task, first,
                    round_up(std::min(VALUE_SLOTS, task.most_seen() - first), STEP) / STEP);
        while (scratch.queries[from].seen <= first) from++;
        for (long at = from; at < Q; at += VALUE_QUERIES) {
            const long more = std::min<long>(VALUE_QUERIES, Q - at) - 1, seen = scratch.queries[at + more].seen;
            (width % 4 ? ADD_VALUES<1> : ADD_VALUES<4>)[more](
                scratch.values.data(), width, round_up(std::min(VALUE_SLOTS, seen - first), STEP) / STEP,
                scratch.weights.data() + at * stride + first, stride, scratch.sums.data() + at * width);
        }
    }
    for (long at = 0; at < Q; at++)
        for (long d = 0; d < width; d++)
            store(out + scratch.queries[at].offset + d * WIDTH, scratch.sums[at * width + d]);
}

struct Shape {
    long N, K, D, C;
    long group() const { return N / K; }
};

// Cuts the rows of a plan into tasks: first those of rows with several tokens, the last tokens of a row first, since
// these take longest. Returns the number of multiplications.
long make_tasks(const Shape& shape, const int64_t* plan, std::vector<Task>& tasks) {
    const int64_t *firsts = plan + 1, *lengths = firsts + shape.C, *stops = lengths + shape.C, *slots = stops + shape.C;
    long work = 0;
    tasks.clear();
    for (long at = 0; at < shape.C; at++) {
        const long begin = at ? stops[at - 1] : 0, seen = stops[at] - begin, tokens = lengths[at];
        const Row row{slots + begin, seen, firsts[at], tokens};
        const long task_tokens = std::clamp(TASK_SCORES / (shape.group() * seen), 1L, TASK_TOKENS);
        for (long end = tokens; end > 0; end -= task_tokens)
            for (long head = 0; head < shape.K; head++)
                tasks.push_back({row, head, std::max(0L, end - task_tokens), end});
        work += tokens * seen * shape.N * shape.D;
    }
    std::stable_partition(tasks.begin(), tasks.end(), [](const Task& task) { return task.row.tokens > 1; });
    return work;
}

void attend(Scratch& scratch, const Shape& shape, const Cache& cache, const Task& task, const Scalar* q, float scale,
            Scalar* out) {
    const long G = shape.group(), stride = round_up(task.most_seen(), WIDTH);
    scratch.queries.clear();
    for (long token = task.begin; token < task.end; token++)
        for (long g = 0; g < G; g++)
            scratch.queries.push_back(
                {task.seen(token), ((task.row.first + token) * shape.N + task.head * G + g) * shape.D});
    const long Q = scratch.queries.size();
    scratch.scores.resize(Q * stride), scratch.weights.resize(Q * stride), scratch.keys.resize(shape.D / STEP);
    score_all(scratch, cache, task, q, scale, stride);
    for (long at = 0; at < Q; at++)
        softmax(scratch.scores.data() + at * stride, scratch.weights.data() + at * stride, scratch.queries[at].seen,
                stride);
    sum_values(scratch, cache, task, stride, out);
}

}  // namespace

// q, out [T, N, D], k, v [M, K, D], plan [C, each row's first token, each row's number of tokens, the end of each row's
// slots, then the slots of all rows]. A row's last token sees all of its slots.
extern "C" void run(const Scalar* q, const Scalar* k, const Scalar* v, Scalar* out, const int64_t* plan, int64_t N,
                    int64_t K, int64_t D, float scale) {
    const Shape shape{N, K, D, plan[0]};
    const Cache cache{k, v, K, D};
    static thread_local std::vector<Task> own_tasks;
    const long work = make_tasks(shape, plan, own_tasks);
    const std::vector<Task>& tasks = own_tasks;  // made by the calling thread, read by all threads
#pragma omp parallel if (work >= PARALLEL_MIN)
    {
        static thread_local Scratch own;
        Scratch& scratch = own;
#pragma omp for schedule(dynamic, 1)
        for (size_t task = 0; task < tasks.size(); task++) attend(scratch, shape, cache, tasks[task], q, scale, out);
    }
}
