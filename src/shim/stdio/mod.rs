//! The standard streams of a process on the host: the streams that containerd names are opened and handed to the
//! machine.
//!
//! Belongs here: the meaning of a stream's name ([`endpoint`]), fifos and files ([`files`]), the threads that write
//! files ([`file_writer`]), logging programs ([`logger`]), containerd's streaming scheme ([`streaming`]), opening all
//! streams of a process ([`open`]), and using them while it runs: those of a process in the guest ([`standard`]), those
//! of an exec in a virtual machine ([`captured`]), and the console of a virtual machine ([`console`]). Does not belong
//! here: when a process starts or ends. [`super::tasks`] calls it; [`super::api`] serves the streaming scheme.
//!
//! Bytes flow directly between the machine and a fifo or the pipe of a logging program. These pass through the shim:
//! output to a file, whose file system could block the machine; the streaming scheme, one message at a time; and the
//! streams of an exec in a virtual machine, whose agent sends them in one piece.
//!
//! The shim keeps the opposite end of each fifo open (containerd `pkg/cio`, and the runc shim's `process/io.go`):
//!
//! - The reading end of standard output and error. If the reader goes away, for example when containerd restarts, the
//!   process gets no error. When the pipe is full it blocks until there is a reader, as with a slow reader.
//! - The writing end of standard input. A client that detaches does not end the input; only
//!   [`StandardStreams::close_stdin`] does.

mod captured;
mod console;
mod endpoint;
mod error;
mod file_writer;
mod files;
mod logger;
mod open;
mod standard;
mod streaming;

#[cfg(test)]
pub(crate) use self::files::read_next;
pub(crate) use self::{
    captured::{CapturedStreams, InputError},
    console::ConsoleStreams,
    open::{StdioContext, StdioSpec},
    standard::StandardStreams,
    streaming::{STREAMING_SERVICE, StreamRegistry},
};
