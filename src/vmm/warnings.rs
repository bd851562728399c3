//! The log of the vmm: its messages go to the shim, which writes them to containerd's log. A guest can cause most of
//! them, so each call site has a rate limit for each device.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use log::{LevelFilter, Log, Metadata, Record};
use parking_lot::Mutex;

use crate::control::{Channel, MAX_WARNING, Notice, RateLimit};

/// The number of messages of one call site that are sent before its rate is limited.
const WARNING_BURST: u32 = 5;

/// The interval after which one more message of the call site is sent.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);

/// The file and line of a log macro, and the device.
type CallSite = (Option<&'static str>, Option<u32>, String);

struct ChannelLog {
    channel: Channel,
    limit: Mutex<RateLimit<CallSite>>,
    /// The number of admitted messages that could not be sent since the last message that was sent.
    lost: AtomicU64,
}

/// Sends the messages of all log macros to `channel`. The target of a message is the name of its device.
pub(super) fn install(channel: Channel) {
    let log = ChannelLog {
        channel,
        limit: Mutex::new(RateLimit::new(WARNING_BURST, WARNING_INTERVAL)),
        lost: AtomicU64::new(0),
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
        // Without an explicit target, it is the path of a module.
        let device = match record.target() {
            target if target.contains("::") => "virtual machine",
            target => target,
        };
        let site = (record.file_static(), record.line(), device.to_owned());
        let Some(suppressed) = self.limit.lock().admit(site, Instant::now()) else {
            return;
        };
        let lost = self.lost.swap(0, Ordering::Relaxed);
        let warning = Notice::Warning {
            device: device.to_owned(),
            text: warning_text(&record.args().to_string(), suppressed, lost),
        };
        // Fails if the shim is gone, or does not read: a device must not wait for the shim.
        if self.channel.send_without_blocking(&warning).is_err() {
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

/// The message, with the number of messages of its kind that were suppressed, and of any kind that were lost.
fn warning_text(message: &str, suppressed: u64, lost: u64) -> String {
    let mut note = match suppressed {
        0 => String::new(),
        count => format!(" ({count} more like this since the last one)"),
    };
    if lost > 0 {
        note.push_str(&format!(
            " ({lost} other warnings were lost: the shim did not read them in time)"
        ));
    }
    let end = message.floor_char_boundary(MAX_WARNING - note.len());
    format!("{}{note}", &message[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_warnings_are_clipped_and_suppressed_ones_counted() {
        assert_eq!(warning_text("short", 0, 0), "short");
        assert_eq!(
            warning_text("short", 7, 0),
            "short (7 more like this since the last one)"
        );
        let long = warning_text(&"é".repeat(MAX_WARNING), u64::MAX, u64::MAX);
        assert!(
            long.len() <= MAX_WARNING && long.ends_with("read them in time)"),
            "{long}"
        );
    }

    #[test]
    fn slow_shim_blocks_no_device_and_gets_the_number_of_lost_warnings() {
        let (shim, vmm) = Channel::pair().unwrap();
        let log = ChannelLog {
            channel: vmm,
            limit: Mutex::new(RateLimit::new(u32::MAX, WARNING_INTERVAL)),
            lost: AtomicU64::new(0),
        };
        // More than the socket's buffer holds.
        for _ in 0..10_000 {
            log.log(&Record::builder().args(format_args!("failed")).build());
        }

        let mut read = 0;
        while let Ok(Some((Notice::Warning { .. }, _))) = shim.try_receive() {
            read += 1;
        }
        log.log(&Record::builder().args(format_args!("failed again")).build());
        let Ok((Notice::Warning { text, .. }, _)) = shim.receive() else {
            panic!("no warning");
        };
        let lost = format!("failed again ({} other warnings were lost", 10_000 - read);
        assert!(text.starts_with(&lost), "{text}");
    }

    #[test]
    fn messages_are_sent_with_their_device_and_limited_by_call_site_and_device() {
        let (shim, vmm) = Channel::pair().unwrap();
        let log = ChannelLog {
            channel: vmm,
            limit: Mutex::new(RateLimit::new(WARNING_BURST, WARNING_INTERVAL)),
            lost: AtomicU64::new(0),
        };
        let send = |target: &str, line| {
            let message = format_args!("failed");
            log.log(&Record::builder().target(target).args(message).line(Some(line)).build());
        };
        for _ in 0..WARNING_BURST + 3 {
            send("nutshell-0", 7);
        }
        send("nutshell-1", 7);
        send("containerd_shim::vmm", 8);
        drop(log);

        let mut devices = Vec::new();
        while let Ok((Notice::Warning { device, text }, _)) = shim.receive() {
            assert_eq!(text, "failed");
            devices.push(device);
        }
        let mut expected = vec!["nutshell-0"; WARNING_BURST as usize];
        expected.extend(["nutshell-1", "virtual machine"]);
        assert_eq!(devices, expected);
    }
}
