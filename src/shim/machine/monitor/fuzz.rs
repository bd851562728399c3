//! The entry point of the fuzz target for notices of a vmm that its guest controls.

#![allow(clippy::unwrap_used, reason = "a fuzz target fails by panic")]

use super::*;
use crate::control::{Channel, fuzz::send_packets};

/// The maximum length of an escaped character in bytes, such as `\u{9f}`.
const ESCAPED: usize = 6;

/// Receives the packets in `data` from a vmm, while callers wait for all answers.
///
/// # Panics
///
/// If a caller gets a long or unprintable text, or more devices than a machine has.
pub(crate) fn receive_notices(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(receive(data));
}

async fn receive(data: &[u8]) {
    let (shim, vmm) = Channel::pair().unwrap();
    send_packets(&vmm, data);
    drop(vmm);
    let control = AsyncChannel::new(shim).unwrap();
    let state = MachineState::new();
    let (console, mut console_answer) = oneshot::channel();
    let (progress, mut progress_answer) = oneshot::channel();
    let (statistics, mut statistics_answer) = oneshot::channel();
    let (memory, mut memory_answer) = oneshot::channel();
    let (boot, mut boot_answer) = oneshot::channel();
    state.console_requests.lock().push(console);
    state.progress_requests.lock().push(progress);
    state.statistics_requests.lock().push(statistics);
    state.memory_requests.lock().push(memory);
    *state.boot_request.lock() = Some(boot);
    let mut answers = Vec::new();
    for slot in 0..3 {
        let (sender, answer) = oneshot::channel();
        state.slot_requests.lock().insert(slot, sender);
        answers.push(answer);
    }
    let (resize, resize_answer) = oneshot::channel();
    *state.resize_request.lock() = Some(resize);
    answers.push(resize_answer);
    let mut stream = state.streams.open().unwrap();

    let ended = super::receive_notices(&state, &control).await;

    if let Some((reason, console)) = ended {
        assert_printable(&describe_end(&reason));
        let tail = printable_tail(&console);
        assert!(
            !tail
                .chars()
                .any(|character| character.is_control() && character != '\n'),
            "{tail:?}"
        );
        if let Some(panic) = find_panic(&console) {
            assert_printable(&panic);
        }
    }
    if let Ok(statistics) = statistics_answer.try_recv() {
        assert!(statistics.devices.len() <= MAX_DEVICES);
        for device in statistics.devices {
            assert!(device.name.len() <= MAX_DEVICE_NAME * ESCAPED + 3);
            assert_printable(&device.name);
        }
    }
    // Each caller gets one answer at most, which a receiver of one answer ensures.
    let _ = (console_answer.try_recv(), progress_answer.try_recv());
    let _ = (memory_answer.try_recv(), boot_answer.try_recv());
    for mut answer in answers {
        if let Ok(Err(reason)) = answer.try_recv() {
            assert_printable(&reason);
            assert!(reason.len() <= MAX_REASON * ESCAPED + 3);
        }
    }
    state.streams.close_all();
    stream.closed().await;
    assert!(stream.is_closed());
}

fn assert_printable(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?}");
}
