//! Links the agent without the tables for unwinding and backtraces, which nothing reads: the guest
//! profile aborts at a panic, and the file is unpacked into every guest's memory.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=link.ld");
    let features = env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    let is_static = features.split(',').any(|feature| feature == "crt-static");
    // That of the guest profile too: the name here is that of the profile at the bottom.
    let is_released = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    if let (true, true, Ok(folder)) = (is_static, is_released, env::var("CARGO_MANIFEST_DIR")) {
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{folder}/link.ld,--no-eh-frame-hdr");
    }
}
