//! A TCP server and client for network measurements.
//!
//! ```text
//! traffic serve ADDRESS
//! traffic echo ADDRESS COUNT       sends one byte and receives it back, COUNT times
//! traffic send ADDRESS BYTES       sends a stream to the server
//! traffic receive ADDRESS BYTES    receives a stream from the server
//! ```
//!
//! The client prints how many microseconds the transfer took, without the time to connect.

use std::{
    env,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    process::ExitCode,
    thread,
    time::Instant,
};

/// Bytes of one read or write of a stream.
const CHUNK: usize = 64 << 10;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["serve", address] => serve(address),
        [operation, address, count] => match (count.parse(), operation) {
            (Ok(count), "echo" | "send" | "receive") => run_client(operation, address, count),
            _ => return ExitCode::from(2),
        },
        _ => return ExitCode::from(2),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("traffic: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves clients until the process is killed. A client sends the first letter of its operation and the count as 8
/// bytes, little-endian.
fn serve(address: &str) -> io::Result<()> {
    for connection in TcpListener::bind(address)?.incoming() {
        let connection = connection?;
        thread::spawn(move || serve_client(connection));
    }
    Ok(())
}

fn serve_client(mut connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let (mut operation, mut count) = ([0], [0; 8]);
    connection.read_exact(&mut operation)?;
    connection.read_exact(&mut count)?;
    let count = u64::from_le_bytes(count);
    match operation[0] {
        b'e' => {
            let mut byte = [0];
            for _ in 0..count {
                connection.read_exact(&mut byte)?;
                connection.write_all(&byte)?;
            }
            Ok(())
        }
        b's' => {
            receive(&mut connection, count)?;
            // The client measures until this confirmation.
            connection.write_all(b".")
        }
        _ => send(&mut connection, count),
    }
}

fn run_client(operation: &str, address: &str, count: u64) -> io::Result<()> {
    let mut connection = TcpStream::connect(address)?;
    connection.set_nodelay(true)?;
    connection.write_all(&operation.as_bytes()[..1])?;
    connection.write_all(&count.to_le_bytes())?;
    let mut byte = [7];
    let start = Instant::now();
    let result = match operation {
        "echo" => {
            for _ in 0..count {
                connection.write_all(&byte)?;
                connection.read_exact(&mut byte)?;
            }
            Ok(())
        }
        "send" => {
            send(&mut connection, count)?;
            connection.read_exact(&mut byte)
        }
        _ => receive(&mut connection, count),
    };
    println!("{}", start.elapsed().as_micros());
    result
}

fn send(connection: &mut TcpStream, mut left: u64) -> io::Result<()> {
    let chunk = vec![0; CHUNK];
    while left > 0 {
        let part = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        connection.write_all(&chunk[..part])?;
        left -= part as u64;
    }
    Ok(())
}

fn receive(connection: &mut TcpStream, mut left: u64) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    while left > 0 {
        let part = connection.read(&mut chunk)?;
        if part == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left = left.saturating_sub(part as u64);
    }
    Ok(())
}
