//! The sandbox container of a pod, for runtimes that need a process to hold the pod's namespaces. It waits until it is
//! killed. It ignores SIGCHLD, so that orphans that it inherits never become zombies.

unsafe extern "C" {
    fn signal(number: i32, action: usize) -> usize;
}

fn main() {
    const SIGCHLD: i32 = 17;
    const IGNORE: usize = 1;
    // SAFETY: `signal` of the C library with the signature that it has on Linux; there is no other thread.
    unsafe { signal(SIGCHLD, IGNORE) };
    loop {
        std::thread::park();
    }
}
