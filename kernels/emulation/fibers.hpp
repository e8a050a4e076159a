// Cooperatively scheduled threads: each has a stack of its own and runs until it blocks or ends. ucontext starts a
// fiber; _setjmp and _longjmp switch between them without the system call that swapcontext makes.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <vector>

namespace emulation {

class Fibers {
public:
    // Runs `count` fibers of entry() to their ends. `on_switch(i)` is told which fiber runs next; `on_deadlock` is
    // called, and must not return, when every remaining fiber waits. With `reverse`, later fibers go first.
    void run(int count, void (*entry)(), void (*on_switch)(int), void (*on_deadlock)(), bool reverse) {
        reserve(count);
        entry_ = entry;
        on_switch_ = on_switch;
        on_deadlock_ = on_deadlock;
        count_ = remaining_ = count;
        step_ = reverse ? count - 1 : 1;
        states_.assign(count, State{});
        if (_setjmp(host_) == 0) resume(reverse ? count - 1 : 0);
    }

    int current() const { return current_; }
    const char* reason(int fiber) const { return states_[fiber].reason; }
    bool finished(int fiber) const { return states_[fiber].finished; }
    void wake(int fiber) { states_[fiber].reason = nullptr; }

    // Stops the running fiber until another one wakes it.
    void block(const char* reason) {
        State& self = states_[current_];
        self.reason = reason;
        const int next = find_runnable();
        if (_setjmp(self.context) == 0) resume(next);
    }

    // Lets the others run and goes on.
    void yield() {
        const int next = find_runnable();
        if (next != current_ && _setjmp(states_[current_].context) == 0) resume(next);
    }

    // Gives every fiber up and returns from run().
    [[noreturn]] void abandon() { _longjmp(host_, 1); }

private:
    static constexpr size_t STACK_BYTES = 128 * 1024;

    struct State {
        jmp_buf context;
        const char* reason = nullptr;  // what the fiber waits for; null: it can run
        bool started = false, finished = false;
    };

    void reserve(int count) {
        while (int(stacks_.size()) < count) {
            void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            stacks_.push_back(stack);
        }
    }

    int find_runnable() {
        int candidate = current_;
        for (int i = 0; i < count_; ++i) {
            candidate = (candidate + step_) % count_;
            if (!states_[candidate].finished && states_[candidate].reason == nullptr) return candidate;
        }
        on_deadlock_();
        abandon();
    }

    [[noreturn]] void resume(int fiber) {
        current_ = fiber;
        on_switch_(fiber);
        if (states_[fiber].started) _longjmp(states_[fiber].context, 1);
        states_[fiber].started = true;
        running_ = this;
        getcontext(&start_);
        start_.uc_stack.ss_sp = stacks_[fiber];
        start_.uc_stack.ss_size = STACK_BYTES;
        start_.uc_link = nullptr;
        makecontext(&start_, &Fibers::trampoline, 0);
        setcontext(&start_);
        __builtin_unreachable();
    }

    static void trampoline() {
        Fibers& fibers = *running_;
        fibers.entry_();
        fibers.states_[fibers.current_].finished = true;
        if (--fibers.remaining_ == 0) fibers.abandon();
        fibers.resume(fibers.find_runnable());
    }

    static inline Fibers* running_ = nullptr;
    std::vector<State> states_;
    std::vector<void*> stacks_;  // kept from launch to launch
    jmp_buf host_;
    ucontext_t start_;
    void (*entry_)() = nullptr;
    void (*on_switch_)(int) = nullptr;
    void (*on_deadlock_)() = nullptr;
    int current_ = 0, count_ = 0, remaining_ = 0, step_ = 1;
};

}  // namespace emulation
