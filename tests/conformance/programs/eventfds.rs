//! Opens as many eventfds as its first argument says, uses each, and prints their number. Keeps all of them open.

use std::{
    fs::File,
    io::{Error, Read, Write},
    os::fd::FromRawFd,
};

unsafe extern "C" {
    safe fn eventfd(value: u32, flags: i32) -> i32;
}

fn main() {
    let count = std::env::args()
        .nth(1)
        .and_then(|count| count.parse().ok())
        .expect("a number");
    let mut files = Vec::new();
    while files.len() < count {
        let descriptor = eventfd(0, 0);
        assert!(
            descriptor >= 0,
            "eventfd number {}: {}",
            files.len(),
            Error::last_os_error()
        );
        // SAFETY: the kernel has just created the descriptor, and nothing else owns it.
        files.push(unsafe { File::from_raw_fd(descriptor) });
    }
    for (index, mut file) in files.iter().enumerate() {
        let value = index as u64 + 1;
        file.write_all(&value.to_ne_bytes()).expect("write to an eventfd");
        let mut bytes = [0; 8];
        file.read_exact(&mut bytes).expect("read from an eventfd");
        assert_eq!(u64::from_ne_bytes(bytes), value);
    }
    println!("{}", files.len());
}
