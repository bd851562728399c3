//! The log of the vmm: its messages go to the shim, which writes them to containerd's log. A guest can cause most of
//! them, so each call site has a rate limit.

use std::time::{Duration, Instant};

use log::{LevelFilter, Log, Metadata, Record};
use parking_lot::Mutex;

use crate::control::{Channel, MAX_WARNING, Notice, RateLimit};

/// How many messages of one call site are sent at once, and how often one is sent after that.
const BURST: u32 = 5;
const INTERVAL: Duration = Duration::from_secs(10);

/// The file and line of a log macro.
type CallSite = (Option<&'static str>, Option<u32>);

struct ChannelLog {
    channel: Channel,
    limit: Mutex<RateLimit<CallSite>>,
}

/// Sends the messages of all log macros to `channel`. The target of a message is the name of its device.
pub(super) fn install(channel: Channel) {
    let log = ChannelLog {
        channel,
        limit: Mutex::new(RateLimit::new(BURST, INTERVAL)),
    };
    if log::set_boxed_logger(Box::new(log)).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

impl Log for ChannelLog {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let site = (record.file_static(), record.line());
        let Some(suppressed) = self.limit.lock().admit(site, Instant::now()) else {
            return;
        };
        // Without an explicit target, it is the path of a module.
        let device = match record.target() {
            target if target.contains("::") => "virtual machine",
            target => target,
        };
        let warning = Notice::Warning {
            device: device.to_owned(),
            text: warning_text(&record.args().to_string(), suppressed),
        };
        // If the shim is gone, nothing reads it. If it does not read, a device must not wait for it.
        let _ = self.channel.send_without_blocking(&warning);
    }

    fn flush(&self) {}
}

fn warning_text(message: &str, suppressed: u64) -> String {
    let note = match suppressed {
        0 => String::new(),
        count => format!(" ({count} more like this since the last one)"),
    };
    let end = message.floor_char_boundary(MAX_WARNING - note.len());
    format!("{}{note}", &message[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_warnings_are_clipped_and_suppressed_ones_counted() {
        assert_eq!(warning_text("short", 0), "short");
        assert_eq!(warning_text("short", 7), "short (7 more like this since the last one)");
        let long = warning_text(&"é".repeat(MAX_WARNING), u64::MAX);
        assert!(
            long.len() <= MAX_WARNING && long.ends_with("since the last one)"),
            "{long}"
        );
    }

    #[test]
    fn shim_that_does_not_read_blocks_no_device() {
        let (_shim, vmm) = Channel::pair().unwrap();
        let log = ChannelLog {
            channel: vmm,
            limit: Mutex::new(RateLimit::new(u32::MAX, INTERVAL)),
        };
        // More than the socket's buffer holds.
        for _ in 0..10_000 {
            log.log(&Record::builder().args(format_args!("failed")).build());
        }
    }

    #[test]
    fn messages_are_sent_with_their_device_and_limited_by_call_site() {
        let (shim, vmm) = Channel::pair().unwrap();
        let log = ChannelLog {
            channel: vmm,
            limit: Mutex::new(RateLimit::new(BURST, INTERVAL)),
        };
        let send = |target: &str, line| {
            let message = format_args!("failed");
            log.log(&Record::builder().target(target).args(message).line(Some(line)).build());
        };
        for _ in 0..BURST + 3 {
            send("nutshell-0", 7);
        }
        send("containerd_shim::vmm", 8);
        drop(log);

        let mut devices = Vec::new();
        while let Ok((Notice::Warning { device, text }, _)) = shim.receive() {
            assert_eq!(text, "failed");
            devices.push(device);
        }
        let mut expected = vec!["nutshell-0"; BURST as usize];
        expected.push("virtual machine");
        assert_eq!(devices, expected);
    }
}
