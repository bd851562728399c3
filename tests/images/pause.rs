//! The container that holds a pod's namespaces under runtimes that need one: it waits until it is killed, and
//! never has a child that nobody waits for.

unsafe extern "C" {
    fn signal(number: i32, action: usize) -> usize;
}

fn main() {
    const SIGCHLD: i32 = 17;
    const IGNORE: usize = 1;
    // SAFETY: the C library's function, with constants of Linux; there is no other thread.
    unsafe { signal(SIGCHLD, IGNORE) };
    loop {
        std::thread::park();
    }
}
