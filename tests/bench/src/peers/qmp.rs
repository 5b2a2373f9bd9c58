//! QEMU's control socket: a line of JSON each way (QEMU Machine Protocol).

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Failure;

/// A line that QEMU wrote.
#[derive(Debug, PartialEq)]
pub(crate) enum Message {
    /// Its first one.
    Greeting,
    /// What a command gave.
    Return(Value),
    /// Why a command was not carried out.
    Error(String),
    /// Something happened.
    Event(Event),
}

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Event {
    pub(crate) name: String,
    /// `data.status`, where it has one: the state of a migration.
    pub(crate) status: Option<String>,
    /// When, by QEMU's clock: microseconds since 1970.
    pub(crate) at_us: u64,
}

impl Message {
    /// Reads a line.
    pub(crate) fn parse(line: &str) -> Result<Self, Failure> {
        let value: Value =
            serde_json::from_str(line).map_err(|e| format!("QEMU wrote no JSON: {e}: {line}"))?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        if let Some(name) = text(&value["event"]) {
            let part = |unit: &str| value["timestamp"][unit].as_u64().unwrap_or(0);
            let at_us =
                part("seconds").saturating_mul(1_000_000).saturating_add(part("microseconds"));
            return Ok(Self::Event(Event { name, status: text(&value["data"]["status"]), at_us }));
        }
        if let Some(why) = text(&value["error"]["desc"]) {
            return Ok(Self::Error(why));
        }
        match (value.get("return"), value.get("QMP")) {
            (Some(given), _) => Ok(Self::Return(given.clone())),
            (None, Some(_)) => Ok(Self::Greeting),
            (None, None) => Err(format!("QEMU wrote something unknown: {line}").into()),
        }
    }
}

/// A connection to one QEMU.
pub(crate) struct Qmp {
    stream: UnixStream,
    unread: Vec<u8>,
    events: VecDeque<Event>,
}

const ANSWER: Duration = Duration::from_secs(30);

impl Qmp {
    /// Connects, and leaves the capabilities mode.
    pub(crate) fn connect(socket: &Path) -> Result<Self, Failure> {
        let stream = UnixStream::connect(socket)?;
        let mut qmp = Self { stream, unread: Vec::new(), events: VecDeque::new() };
        match qmp.message(Instant::now() + ANSWER)? {
            Some(Message::Greeting) => {}
            other => return Err(format!("QEMU did not greet: {other:?}").into()),
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Carries out a command.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.stream.write_all(line.as_bytes())?;
        let until = Instant::now() + ANSWER;
        loop {
            match self.message(until)? {
                Some(Message::Return(value)) => return Ok(value),
                Some(Message::Error(why)) => return Err(format!("QEMU: {command}: {why}").into()),
                Some(Message::Event(event)) => self.events.push_back(event),
                Some(Message::Greeting) => {}
                None => return Err(format!("QEMU does not answer {command}").into()),
            }
        }
    }

    /// The next event; none until then.
    pub(crate) fn event(&mut self, until: Instant) -> Result<Option<Event>, Failure> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        match self.message(until)? {
            Some(Message::Event(event)) => Ok(Some(event)),
            Some(other) => Err(format!("QEMU said unasked: {other:?}").into()),
            None => Ok(None),
        }
    }

    fn message(&mut self, until: Instant) -> Result<Option<Message>, Failure> {
        loop {
            if let Some(end) = self.unread.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return Message::parse(&String::from_utf8_lossy(&line)).map(Some);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err("QEMU closed its control socket".into()),
                Ok(n) => self.unread.extend_from_slice(&buffer[..n]),
                Err(e)
                    if [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut].contains(&e.kind()) => {
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_line_is_told_apart_and_others_are_an_error() {
        let of = |line: &str| Message::parse(line).unwrap();
        assert_eq!(of(r#"{"QMP": {"version": {}, "capabilities": []}}"#), Message::Greeting);
        assert_eq!(
            of(r#"{"return": {"status": "active"}}"#),
            Message::Return(json!({"status": "active"}))
        );
        assert_eq!(
            of(r#"{"error": {"class": "GenericError", "desc": "not so"}}"#),
            Message::Error("not so".into())
        );
        let event = |name: &str, status: Option<&str>, at_us| {
            Message::Event(Event { name: name.into(), status: status.map(Into::into), at_us })
        };
        assert_eq!(
            of(
                r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "MIGRATION", "data": {"status": "completed"}}"#
            ),
            event("MIGRATION", Some("completed"), 1_000_002)
        );
        assert_eq!(of(r#"{"event": "STOP"}"#), event("STOP", None, 0));
        for line in ["", "{", "[]", "{}", "7", r#"{"error": {}}"#] {
            assert!(Message::parse(line).is_err(), "{line}");
        }
    }
}
