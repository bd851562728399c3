//! Standard streams: fifos, logging programs, and streams that clients open on the shim's socket.

use std::io::{ErrorKind, Read, Write};

use containerd_shim::protos::{
    api::{CloseIORequest, Empty},
    protobuf::well_known_types::wrappers::{BytesValue, Int32Value, StringValue},
    ttrpc::{Request as RawRequest, asynchronous::ClientStream},
};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use tokio::io::AsyncWriteExt;

use super::*;
use crate::shim::{stdio::STREAMING_SERVICE, tests::script::write_script};

const STREAM_INIT: &str = "containerd.services.streaming.v1.StreamInit";
const DATA: &str = "containerd.types.transfer.Data";
const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";

impl Shim {
    async fn close_stdin(&self, id: &str) {
        let request = CloseIORequest {
            id: id.to_owned(),
            stdin: true,
            ..CloseIORequest::default()
        };
        self.task.close_io(context::Context::default(), &request).await.unwrap();
    }

    /// Opens a stream on a new connection, as the CRI does.
    async fn open(&self, id: &str) -> ClientStream<Any, Any> {
        let client = connect(&self.folder.path().join("socket")).await;
        let request = RawRequest {
            service: STREAMING_SERVICE.to_owned(),
            method: "Stream".to_owned(),
            ..RawRequest::default()
        };
        let mut stream = ClientStream::<Any, Any>::new(client.new_stream(request, true, true).await.unwrap());
        let init = StringValue {
            value: id.to_owned(),
            ..StringValue::default()
        };
        stream.send(&any(STREAM_INIT, &init)).await.unwrap();
        let answer = stream.recv().await.unwrap();
        assert_eq!(answer.type_url, "google.protobuf.Empty");
        stream
    }

    /// A request to create `id` with streams that clients open.
    fn streaming_request(&self, id: &str) -> CreateTaskRequest {
        let socket = self.folder.path().join("socket");
        let uri = |stream| format!("ttrpc+unix://{}?streaming_id={id}-{stream}", socket.display());
        CreateTaskRequest {
            stdin: uri("stdin"),
            stdout: uri("stdout"),
            stderr: String::new(),
            ..self.request(id)
        }
    }

    /// Runs `c1` with streams that this opens: standard input and output.
    async fn run_streaming(&self) -> (ClientStream<Any, Any>, ClientStream<Any, Any>) {
        let streams = (self.open("c1-stdin").await, self.open("c1-stdout").await);
        self.create_as(&self.streaming_request("c1")).await.unwrap();
        self.start_task("c1", "").await.unwrap();
        streams
    }

    async fn create_as(&self, request: &CreateTaskRequest) -> ttrpc::Result<u32> {
        let created = self.task.create(context::Context::default(), request).await?;
        Ok(created.pid)
    }
}

#[tokio::test]
async fn streams_of_a_process_that_is_not_created_are_closed() {
    let shim = Shim::start().await;
    let stdout = shim.open("c1-stdout").await;
    let mut request = shim.streaming_request("c1");
    request.bundle = "/no/such/bundle".to_owned();

    shim.create_as(&request).await.unwrap_err();

    let bytes = tokio::time::timeout(std::time::Duration::from_secs(20), receive_all(stdout)).await;
    assert!(bytes.expect("the stream stays open").is_empty());
}

#[tokio::test]
async fn streams_of_an_exec_that_is_refused_or_never_started_are_closed() {
    let shim = Shim::start().await;
    shim.run("c1").await;
    let uri = |id: &str| {
        let socket = shim.folder.path().join("socket");
        format!("ttrpc+unix://{}?streaming_id={id}", socket.display())
    };
    let limit = std::time::Duration::from_secs(20);

    let refused = shim.open("refused").await;
    let error = shim.exec_with_output("c1", "../e", "true", &uri("refused")).await;
    error.unwrap_err();
    let closed = tokio::time::timeout(limit, receive_all(refused)).await;
    assert!(closed.expect("the stream stays open").is_empty());

    let unstarted = shim.open("unstarted").await;
    shim.exec_with_output("c1", "e1", "true", &uri("unstarted"))
        .await
        .unwrap();
    // The streams of the first exec stay open.
    let again = shim.exec_with_output("c1", "e1", "true", &uri("unstarted")).await;
    again.unwrap_err();
    let closed = tokio::spawn(receive_all(unstarted));
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    assert!(!closed.is_finished());
    shim.delete("c1", "e1").await.unwrap();
    let closed = tokio::time::timeout(limit, closed).await;
    assert!(closed.expect("the stream stays open").unwrap().is_empty());
}

fn any(type_url: &str, message: &impl Message) -> Any {
    Any {
        type_url: type_url.to_owned(),
        value: message.write_to_bytes().unwrap(),
        ..Any::default()
    }
}

fn data(bytes: &[u8]) -> Any {
    let message = BytesValue {
        value: bytes.to_vec(),
        ..BytesValue::default()
    };
    any(DATA, &message)
}

/// Reads a stream until the shim closes it.
async fn receive_all(mut stream: ClientStream<Any, Any>) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        match stream.recv().await {
            Ok(message) => {
                assert_eq!(message.type_url, DATA);
                bytes.extend(BytesValue::parse_from_bytes(&message.value).unwrap().value);
            }
            Err(ttrpc::Error::Eof) => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Waits for the shim's next window update.
async fn receive_window(stream: &mut ClientStream<Any, Any>) -> i32 {
    let update = stream.recv().await.unwrap();
    assert_eq!(update.type_url, WINDOW_UPDATE);
    Int32Value::parse_from_bytes(&update.value).unwrap().value
}

/// Reads the next bytes from a pipe. Does not block this thread, on which the shim runs.
async fn read_some(input: &File) -> Vec<u8> {
    let input = input.try_clone().unwrap();
    tokio::task::spawn_blocking(move || read_next(&input)).await.unwrap()
}

#[tokio::test]
async fn output_and_its_end_reach_the_reader_before_delete_returns() {
    let shim = Shim::start().await;
    let request = shim.request("c1");
    let reader = open_reader(&shim, "c1");
    shim.create_as(&request).await.unwrap();
    shim.start_task("c1", "").await.unwrap();
    shim.fake.write_and_close("c1", "final message");
    shim.fake.report_exit("c1", None, 0, [13, 0]);
    shim.wait("c1", "").await.unwrap();

    shim.delete("c1", "").await.unwrap();

    assert_eq!(read_next(&reader), b"final message");
    assert_eq!(read_next(&reader), b"");
}

#[tokio::test]
async fn output_stays_writable_without_a_reader() {
    let shim = Shim::start().await;
    shim.run("c1").await;
    // No other process has opened the fifo.
    shim.fake.write_and_close("c1", "unread");
    shim.fake.report_exit("c1", None, 0, [6, 0]);
    assert_eq!(shim.wait("c1", "").await.unwrap(), 0);
    let late = open_reader(&shim, "c1");
    assert_eq!(read_next(&late), b"unread");
    assert_eq!(read_next(&late), b"");
}

#[tokio::test]
async fn stdin_ends_with_close_io_and_not_when_a_client_disconnects() {
    let shim = Shim::start().await;
    shim.run("c1").await;
    let mut input = shim.fake.take_input("c1");
    let fifo = shim.folder.path().join("c1/in");
    for text in ["first", "again"] {
        let mut client = File::options().write(true).open(&fifo).unwrap();
        client.write_all(text.as_bytes()).unwrap();
        drop(client);
        let mut bytes = [0; 16];
        assert_eq!(input.read(&mut bytes).unwrap(), 5);
        assert_eq!(input.read(&mut bytes).unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    shim.close_stdin("c1").await;
    shim.close_stdin("c1").await;

    assert_eq!(read_next(&input), b"");
}

#[tokio::test]
async fn close_io_before_the_start_of_an_exec_takes_effect() {
    let shim = Shim::start().await;
    shim.run("c1").await;
    let request = ExecProcessRequest {
        id: "c1".to_owned(),
        exec_id: "e1".to_owned(),
        stdin: shim.folder.path().join("c1/in").display().to_string(),
        spec: Some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: br#"{"args":["cat"],"cwd":"/"}"#.to_vec(),
            ..Any::default()
        })
        .into(),
        ..ExecProcessRequest::default()
    };
    shim.task.exec(context::Context::default(), &request).await.unwrap();
    let close = CloseIORequest {
        id: "c1".to_owned(),
        exec_id: "e1".to_owned(),
        stdin: true,
        ..CloseIORequest::default()
    };
    let closed: ttrpc::Result<Empty> = shim.task.close_io(context::Context::default(), &close).await;
    closed.unwrap();
    // The container's standard input is the same fifo, and would keep it open.
    shim.close_stdin("c1").await;

    shim.start_task("c1", "e1").await.unwrap();

    let input = shim.fake.take_exec_input("c1", "e1");
    assert_eq!(read_next(&input), b"");
}

#[tokio::test]
async fn logging_program_gets_all_output_and_exits_before_delete_returns() {
    let shim = Shim::start().await;
    let log = shim.folder.path().join("log");
    let program = shim.folder.path().join("logger");
    let script = format!(
        "exec >{}; exec 5>&-\necho $CONTAINER_ID: $1 $2 $(/bin/cat <&3); /bin/cat <&4; echo end",
        log.display()
    );
    write_script(&program, &script);
    let request = CreateTaskRequest {
        stdout: format!("binary://{}?key=a+b", program.display()),
        stderr: String::new(),
        ..shim.request("c1")
    };
    shim.create_as(&request).await.unwrap();
    shim.start_task("c1", "").await.unwrap();
    shim.fake.write_and_close("c1", "final message");
    shim.fake.report_exit("c1", None, 0, [13, 0]);
    shim.wait("c1", "").await.unwrap();

    shim.delete("c1", "").await.unwrap();

    assert_eq!(fs::read_to_string(log).unwrap(), "c1: key a b final message\nend\n");
}

#[tokio::test]
async fn create_fails_if_the_logging_program_cannot_start() {
    let mut shim = Shim::start().await;
    let request = CreateTaskRequest {
        stdout: "binary:///no/such/logger".to_owned(),
        stderr: "binary:///no/such/logger".to_owned(),
        ..shim.request("c1")
    };
    let (_, text) = error_of(shim.create_as(&request).await);
    assert!(
        text.contains("start the logging program /no/such/logger: No such file or directory"),
        "{text}"
    );
    shim.assert_no_more_events().await;
}

#[tokio::test]
async fn streamed_output_reaches_its_client_before_the_exit_is_reported() {
    let shim = Shim::start().await;
    let (_stdin, stdout) = shim.run_streaming().await;
    let client = tokio::spawn(receive_all(stdout));
    let block: Vec<u8> = (0..1 << 20).map(|at: u32| at.to_le_bytes()[1]).collect();
    let mut output = shim.fake.take_output("c1");
    let pipe = output.try_clone().unwrap();
    let written = block.clone();
    let writer = tokio::task::spawn_blocking(move || output.write_all(&written).unwrap());
    shim.fake.report_exit("c1", None, 0, [1 << 20, 0]);

    shim.wait("c1", "").await.unwrap();

    let left = rustix::io::ioctl_fionread(pipe).unwrap();
    assert_eq!(left, 0, "the exit was reported before the client had all output");
    writer.await.unwrap();
    shim.fake.report_closed_output("c1");
    shim.delete("c1", "").await.unwrap();
    let received = client.await.unwrap();
    assert!(received == block, "{} of {} bytes", received.len(), block.len());
}

#[tokio::test]
async fn client_that_does_not_read_blocks_the_writer() {
    let shim = Shim::start().await;
    let _stdin = shim.open("c1-stdin").await;
    let mut stdout = UnixStream::connect(shim.folder.path().join("socket")).await.unwrap();
    let request = RawRequest {
        service: STREAMING_SERVICE.to_owned(),
        method: "Stream".to_owned(),
        ..RawRequest::default()
    };
    let init = StringValue {
        value: "c1-stdout".to_owned(),
        ..StringValue::default()
    };
    // ttrpc frames: length, stream id, type (1 request, 3 data), flags (2 open, 4 no data).
    for (kind, flags, payload) in [
        (1, 6, request.write_to_bytes().unwrap()),
        (3, 0, any(STREAM_INIT, &init).write_to_bytes().unwrap()),
    ] {
        let length = u32::try_from(payload.len()).unwrap();
        let header = [length.to_be_bytes(), 1_u32.to_be_bytes()].concat();
        stdout
            .write_all(&[header, vec![kind, flags], payload].concat())
            .await
            .unwrap();
    }
    shim.create_as(&shim.streaming_request("c1")).await.unwrap();
    shim.start_task("c1", "").await.unwrap();
    let mut output = shim.fake.take_output("c1");
    fcntl_setfl(&output, fcntl_getfl(&output).unwrap() | OFlags::NONBLOCK).unwrap();

    let (mut accepted, mut refused) = (0, 0);
    while refused < 1000 {
        match output.write(&[b'x'; 4096]) {
            Ok(count) => (accepted, refused) = (accepted + count, 0),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                refused += 1;
                tokio::task::yield_now().await;
            }
        }
        assert!(
            accepted < 2 << 20,
            "the shim accepted {accepted} bytes without a reader"
        );
    }
}

#[tokio::test]
async fn reconnected_client_gets_the_remaining_output() {
    let shim = Shim::start().await;
    let (_stdin, mut stdout) = shim.run_streaming().await;
    let mut output = shim.fake.take_output("c1");
    output.write_all(b"before").unwrap();
    assert_eq!(stdout.recv().await.unwrap(), data(b"before"));

    stdout.close_send().await.unwrap();
    assert!(matches!(stdout.recv().await, Err(ttrpc::Error::Eof)));
    output.write_all(b"meanwhile").unwrap();
    let stdout = shim.open("c1-stdout").await;
    drop(output);

    assert_eq!(receive_all(stdout).await, b"meanwhile");
}

#[tokio::test]
async fn streamed_stdin_ends_with_close_io_and_not_when_a_client_disconnects() {
    let shim = Shim::start().await;
    let (mut stdin, _stdout) = shim.run_streaming().await;
    let input = shim.fake.take_input("c1");
    assert_eq!(receive_window(&mut stdin).await, 64 << 10);
    stdin.send(&data(b"first")).await.unwrap();
    assert_eq!(read_some(&input).await, b"first");

    stdin.close_send().await.unwrap();
    assert!(matches!(stdin.recv().await, Err(ttrpc::Error::Eof)));
    let mut stdin = shim.open("c1-stdin").await;
    receive_window(&mut stdin).await;
    stdin.send(&data(b"again")).await.unwrap();
    assert_eq!(read_some(&input).await, b"again");

    // CloseIO and the data use different connections: CloseIO may arrive first.
    shim.close_stdin("c1").await;
    stdin.send(&data(b"late")).await.unwrap();
    stdin.close_send().await.unwrap();
    assert_eq!(read_some(&input).await, b"late");
    assert_eq!(read_some(&input).await, b"");
}

#[tokio::test]
async fn streamed_stdin_larger_than_the_window_arrives() {
    let shim = Shim::start().await;
    let (mut stdin, _stdout) = shim.run_streaming().await;
    let mut input = shim.fake.take_input("c1");
    let reader = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        input.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let block: Vec<u8> = (0..1 << 20).map(|at: u32| at.to_le_bytes()[1]).collect();
    let mut granted = 0;
    for piece in block.chunks(30_000) {
        let length = i32::try_from(piece.len()).unwrap();
        while granted < length {
            granted += receive_window(&mut stdin).await;
        }
        stdin.send(&data(piece)).await.unwrap();
        granted -= length;
    }
    shim.close_stdin("c1").await;
    stdin.close_send().await.unwrap();
    assert!(reader.await.unwrap() == block);
}

#[tokio::test]
async fn streamed_stdin_of_a_connected_client_ends_with_close_io() {
    let shim = Shim::start().await;
    let (mut stdin, _stdout) = shim.run_streaming().await;
    let input = shim.fake.take_input("c1");
    receive_window(&mut stdin).await;
    shim.close_stdin("c1").await;
    assert_eq!(read_some(&input).await, b"");
}

#[tokio::test]
async fn streams_of_a_killed_and_deleted_task_are_closed() {
    let shim = Shim::start().await;
    let (mut stdin, stdout) = shim.run_streaming().await;
    receive_window(&mut stdin).await;
    shim.kill("c1", "", 9).await.unwrap();
    shim.wait("c1", "").await.unwrap();
    shim.delete("c1", "").await.unwrap();
    assert_eq!(receive_all(stdout).await, b"");
    assert!(matches!(stdin.recv().await, Err(ttrpc::Error::Eof)));
}
