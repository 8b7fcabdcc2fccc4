// What Python sets in the library once a process, past any operator.
#pragma once

extern "C" {

// `check` says whether a signal has come that ends what the calling thread waits for. It is called
// without the GIL and without a lock, by threads of the interpreter and by others.
__attribute__((visibility("default"))) void fastattn_set_interrupt_check(bool (*check)());

// Mode of the queues and the shared memory of signals (fastattn/env.py).
__attribute__((visibility("default"))) void fastattn_set_kv_signal_mode(int mode);

}  // extern "C"
