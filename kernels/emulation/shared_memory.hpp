// The shared memory of the blocks that run together, with a shadow that finds data races.
//
// Every 4-byte word remembers who wrote it last and which warps have read it since. Two accesses are ordered when the
// same thread made both, when a warp barrier (same warp) lies between them, or when block, named or cluster barriers
// lead from one warp to the other; that last relation is kept as vector clocks, one entry a warp. Any conflicting pair
// (at least one write) that is not ordered is a race, whatever order the fibers happened to run in.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace emulation {

[[noreturn]] void fail(const char* format, ...);

constexpr int NO_LANE = -1;  // an access made for several lanes: ordered with no lane of its own warp

struct Stamp {
    std::uint32_t clock = 0;  // the warp's own clock, advanced by barriers
    std::uint32_t phase = 0;  // the warp's count of warp barriers
    std::int32_t lane = NO_LANE;
};

// Where an access comes from.
struct Actor {
    int warp, lane;
};

class SharedMemory {
public:
    // Room for `blocks` blocks of `bytes` each and `warps` warps in all; poisons the contents with NaN patterns.
    void reset(int blocks, unsigned bytes, int warps) {
        bytes_ = bytes;
        forgiven_ = false;
        data_.assign(size_t(blocks) * bytes, 0xff);
        const size_t words = data_.size() / 4;
        if (warps != warps_ || words != writes_.size()) {
            warps_ = warps;
            writes_.assign(words, Stamp{});
            writers_.assign(words, 0);
            reads_.assign(words * warps, Stamp{});
            additions_.clear();
            added_.assign(words, 0);
            phases_.assign(warps, 1);
            latest_ = 0;
        }
        pending_.assign(words, 0);
        // Clocks go on from the blocks before, so every earlier stamp counts as ordered and none need be cleared.
        clocks_.assign(size_t(warps) * warps, latest_);
        ++latest_;
        for (int w = 0; w < warps; ++w) {
            clock(w, w) = latest_;
            ++phases_[w];
        }
    }

    unsigned bytes() const { return bytes_; }

    // From now on to the end of the launch races are none: it has given up, and nobody reads what it writes.
    void forgive() { forgiven_ = true; }

    void read(int block, unsigned offset, void* destination, unsigned bytes, Actor actor) {
        const size_t at = locate(block, offset, bytes, "read");
        for (size_t word = at / 4; word < (at + bytes) / 4; ++word) {
            check_landed(word, "read");
            if (!ordered(writes_[word], writers_[word], actor)) report("reads", "wrote", word, actor, writers_[word]);
            check_additions("reads", word, actor);
            note_read(reads_[word * warps_ + actor.warp], actor);
        }
        std::memcpy(destination, &data_[at], bytes);
    }

    void write(int block, unsigned offset, const void* source, unsigned bytes, Actor actor) {
        const size_t at = locate(block, offset, bytes, "write");
        claim(at, bytes, actor);
        std::memcpy(&data_[at], source, bytes);
    }

    // An atomic addition, ordered with other additions whatever the barriers; returns the old value.
    std::uint32_t add(int block, unsigned offset, std::uint32_t value, Actor actor) {
        const size_t at = locate(block, offset, 4, "addition"), word = at / 4;
        check_landed(word, "addition");
        if (!ordered(writes_[word], writers_[word], actor)) report("adds to", "wrote", word, actor, writers_[word]);
        for (int w = 0; w < warps_; ++w)
            if (!ordered(reads_[word * warps_ + w], w, actor)) report("adds to", "read", word, actor, w);
        if (additions_.empty()) additions_.assign(reads_.size(), Stamp{});
        added_[word] = 1;
        note_read(additions_[word * warps_ + actor.warp], actor);
        std::uint32_t old;
        std::memcpy(&old, &data_[at], 4);
        value += old;
        std::memcpy(&data_[at], &value, 4);
        return old;
    }

    // An asynchronous copy of 16 bytes is issued: from now on nobody may touch its target.
    void issue_copy(int block, unsigned offset, Actor actor) {
        const size_t at = locate(block, offset, 16, "copy");
        claim(at, 16, actor);
        for (size_t word = at / 4; word < at / 4 + 4; ++word) pending_[word] = 1;
    }

    void land_copy(int block, unsigned offset, const void* source, Actor actor) {
        const size_t at = locate(block, offset, 16, "copy");
        for (size_t word = at / 4; word < at / 4 + 4; ++word) pending_[word] = 0;
        claim(at, 16, actor);
        std::memcpy(&data_[at], source, 16);
    }

    void sync_warp(int warp) { ++phases_[warp]; }

    // All warps of the list have met: what each did before is ordered with what each does next.
    void sync_warps(const std::vector<int>& warps) {
        std::vector<std::uint32_t> joined(warps_, 0);
        for (int w : warps)
            for (int other = 0; other < warps_; ++other)
                if (clock(w, other) > joined[other]) joined[other] = clock(w, other);
        for (int w : warps) {
            for (int other = 0; other < warps_; ++other) clock(w, other) = joined[other];
            if (++clock(w, w) > latest_) latest_ = clock(w, w);
            ++phases_[w];
        }
    }

    // What this warp has done and seen so far joins `clocks`; what it does from now on does not.
    void release(int warp, std::vector<std::uint32_t>& clocks) {
        clocks.resize(warps_, 0);
        for (int other = 0; other < warps_; ++other)
            if (clock(warp, other) > clocks[other]) clocks[other] = clock(warp, other);
        if (++clock(warp, warp) > latest_) latest_ = clock(warp, warp);
        ++phases_[warp];
    }

    // What joined `clocks` is ordered before this warp's next access.
    void acquire(int warp, const std::vector<std::uint32_t>& clocks) {
        for (int other = 0; other < warps_; ++other)
            if (clocks[other] > clock(warp, other)) clock(warp, other) = clocks[other];
    }

private:
    // clock(w, o): how much of warp o's past is ordered before warp w's next access.
    std::uint32_t& clock(int warp, int other) { return clocks_[size_t(warp) * warps_ + other]; }

    size_t locate(int block, unsigned offset, unsigned bytes, const char* what) const {
        if (offset > bytes_ || bytes > bytes_ - offset)
            fail("shared memory %s of %u bytes at offset %d lies outside the %u bytes of the launch", what, bytes,
                 int(offset), bytes_);
        if (offset % bytes != 0) fail("shared memory %s of %u bytes at offset %u is misaligned", what, bytes, offset);
        return size_t(block) * bytes_ + offset;
    }

    void check_landed(size_t word, const char* what) const {
        if (pending_[word])
            fail("shared memory %s at offset %zu while an asynchronous copy into it is in flight", what,
                 word * 4 % bytes_);
    }

    bool ordered(const Stamp& stamp, int warp, Actor actor) {
        if (forgiven_) return true;
        if (warp != actor.warp) return clock(actor.warp, warp) >= stamp.clock;
        return stamp.phase < phases_[warp] || (stamp.lane == actor.lane && stamp.lane != NO_LANE);
    }

    void note_read(Stamp& stamp, Actor actor) {
        const bool same_phase = stamp.phase == phases_[actor.warp];
        stamp.lane = same_phase && stamp.lane != actor.lane ? NO_LANE : actor.lane;
        stamp.phase = phases_[actor.warp];
        stamp.clock = clock(actor.warp, actor.warp);
    }

    void check_additions(const char* now, size_t word, Actor actor) {
        if (!added_[word]) return;
        for (int w = 0; w < warps_; ++w)
            if (!ordered(additions_[word * warps_ + w], w, actor)) report(now, "added to", word, actor, w);
    }

    // Checks that a write is ordered behind all earlier accesses and records it.
    void claim(size_t at, unsigned bytes, Actor actor) {
        for (size_t word = at / 4; word < (at + bytes) / 4; ++word) {
            check_landed(word, "write");
            if (!ordered(writes_[word], writers_[word], actor)) report("writes", "wrote", word, actor, writers_[word]);
            for (int w = 0; w < warps_; ++w)
                if (!ordered(reads_[word * warps_ + w], w, actor)) report("writes", "read", word, actor, w);
            check_additions("writes", word, actor);
            writes_[word] = {clock(actor.warp, actor.warp), phases_[actor.warp], actor.lane};
            writers_[word] = actor.warp;
        }
    }

    [[noreturn]] void report(const char* now, const char* before, size_t word, Actor actor, int other) const {
        fail("race on shared memory at offset %zu: warp %d %s what warp %d %s with no barrier between",
             word * 4 % bytes_, actor.warp, now, other, before);
    }

    bool forgiven_ = false;
    unsigned bytes_ = 0;
    int warps_ = 0;
    std::uint32_t latest_ = 0;
    std::vector<unsigned char> data_;
    std::vector<unsigned char> pending_;
    std::vector<Stamp> writes_;
    std::vector<int> writers_;
    std::vector<Stamp> reads_;      // (words, warps)
    std::vector<Stamp> additions_;  // (words, warps), or empty: none yet
    std::vector<unsigned char> added_;
    std::vector<std::uint32_t> clocks_, phases_;
};

}  // namespace emulation
