//! Printing to stdout so that a terminal is safe from what is stored, and a reader that goes away
//! is no panic.

use std::{
    io::{self, BufWriter, IsTerminal as _, Write},
    time::Duration,
};

use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde::Serialize;

use crate::Ttl;

/// Characters of a value in a table's cell.
const CELL_CHARS: usize = 60;
/// Bytes of a value that a person is shown; `--raw` shows all.
const SHOWN_BYTES: usize = 16 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OutputFormat {
    /// For people
    Table,
    /// One object
    Json,
    /// One object a line
    Jsonl,
    /// The bare datum
    Raw,
}

pub(super) struct Output {
    pub(super) format: OutputFormat,
    terminal: bool,
    stdout: BufWriter<Box<dyn Write>>,
}

impl Output {
    pub(super) fn stdout(format: OutputFormat) -> Self {
        let stdout = io::stdout();
        Self {
            format,
            terminal: stdout.is_terminal(),
            stdout: BufWriter::new(Box::new(stdout)),
        }
    }

    /// Into memory, to be read when the output is dropped.
    #[cfg(test)]
    pub(super) fn for_test(
        format: OutputFormat,
        terminal: bool,
        sink: std::sync::mpsc::Sender<Vec<u8>>,
    ) -> Self {
        struct Sink(std::sync::mpsc::Sender<Vec<u8>>);
        impl Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        Self {
            format,
            terminal,
            stdout: BufWriter::new(Box::new(Sink(sink))),
        }
    }

    /// One object: over several lines with `-o json`, on one with `-o jsonl`.
    pub(super) fn object(&mut self, object: &impl Serialize) -> io::Result<()> {
        match self.format {
            OutputFormat::Json => serde_json::to_writer_pretty(&mut self.stdout, object)?,
            _ => serde_json::to_writer(&mut self.stdout, object)?,
        }
        self.bytes(b"\n")
    }

    /// One object on the current line.
    pub(super) fn object_inline(&mut self, object: &impl Serialize) -> io::Result<()> {
        Ok(serde_json::to_writer(&mut self.stdout, object)?)
    }

    pub(super) fn line(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.stdout, "{line}")
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stdout.write_all(bytes)
    }

    /// Exactly these bytes; a terminal gets a newline so that its prompt is not glued to them.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes(bytes)?;
        if self.terminal {
            self.bytes(b"\n")
        } else {
            Ok(())
        }
    }

    /// `name  value` lines, aligned; those without a value are left out.
    pub(super) fn fields(&mut self, fields: &[(&str, Option<String>)]) -> io::Result<()> {
        let said = fields
            .iter()
            .filter_map(|(name, value)| Some((name, value.as_ref()?)));
        let width = said.clone().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, value) in said {
            writeln!(self.stdout, "{name:width$}  {value}")?;
        }
        Ok(())
    }

    pub(super) fn table(
        &mut self,
        header: &[&str],
        rows: impl IntoIterator<Item = Vec<String>>,
    ) -> io::Result<()> {
        let mut table = Table::new();
        table.set_header(header.to_vec()).add_rows(rows);
        self.aligned(table)
    }

    /// Of a table whose header was printed before.
    pub(super) fn rows(&mut self, rows: impl IntoIterator<Item = Vec<String>>) -> io::Result<()> {
        let mut table = Table::new();
        table.add_rows(rows);
        self.aligned(table)
    }

    fn aligned(&mut self, mut table: Table) -> io::Result<()> {
        table.load_style(presets::NOTHING);
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        for line in table.to_string().lines() {
            writeln!(self.stdout, "{}", line.trim_end())?;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.stdout.flush()
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        self.flush()
    }
}

/// Text that cannot move the cursor, colour the screen or reorder what follows. What joins the
/// parts of one picture or letter to it stays; without one before it, it is hidden text.
pub(super) fn safe(text: &str) -> String {
    const JOINER: char = '\u{200d}';
    const VARIATIONS: std::ops::RangeInclusive<char> = '\u{fe00}'..='\u{fe0f}';
    let mut out = String::with_capacity(text.len());
    let mut before = ' ';
    for c in text.chars() {
        let joins = c == JOINER || VARIATIONS.contains(&c);
        match c {
            '"' | '\'' | '\\' => out.push(c),
            c if joins && !before.is_ascii() && before != JOINER => out.push(c),
            c => out.extend(c.escape_debug()),
        }
        before = c;
    }
    out
}

/// Bytes for people: text as it is, other bytes escaped.
pub(super) fn shown(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => safe(text),
        Err(_) => bytes.escape_ascii().to_string(),
    }
}

/// A value for people, cut where it gets long.
pub(super) fn shown_value(value: &[u8]) -> String {
    if value.len() <= SHOWN_BYTES {
        return shown(value);
    }
    format!(
        "{}… ({} bytes; --raw prints all)",
        shown(start(value, SHOWN_BYTES)),
        value.len()
    )
}

/// A value in a table's cell.
pub(super) fn cell(value: &[u8]) -> String {
    let text = shown(start(value, CELL_CHARS * 4));
    match text.char_indices().nth(CELL_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

pub(super) fn time(duration: Duration) -> String {
    // Milliseconds matter only for what is young.
    let rounded = if duration < Duration::from_secs(60) {
        duration
    } else {
        Duration::from_secs(duration.as_secs())
    };
    humantime::format_duration(rounded).to_string()
}

pub(super) fn ttl(ttl: Option<Ttl>) -> String {
    match ttl {
        None => "forever".to_owned(),
        Some(Ttl::Left(left)) => time(left),
        Some(Ttl::Past(past)) => format!("-{}", time(past)),
    }
}

/// At most `bytes` of it, and no half character at the end if it is text.
fn start(value: &[u8], bytes: usize) -> &[u8] {
    let cut = &value[..value.len().min(bytes)];
    match std::str::from_utf8(cut) {
        // Text until the cut went through a character.
        Err(error) if error.error_len().is_none() && cut.len() < value.len() => {
            &cut[..error.valid_up_to()]
        }
        _ => cut,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_cannot_command_the_terminal() {
        let shown = shown("red\x1b[31m\r\n\u{202e}\u{9b}é日\"".as_bytes());
        assert_eq!(shown, "red\\u{1b}[31m\\r\\n\\u{202e}\\u{9b}é日\"");
        assert_eq!(super::shown(b"\xff\x00\x1bA"), "\\xff\\x00\\x1bA");
    }

    #[test]
    fn a_picture_of_several_parts_stays_whole() {
        let family = "\u{1f469}\u{200d}\u{1f467} \u{2764}\u{fe0f}";
        assert_eq!(safe(family), family);
        assert_eq!(safe("a\u{200d}b"), "a\\u{200d}b", "hidden in plain text");
    }

    #[test]
    fn raw_is_exactly_the_bytes_and_a_newline_only_on_a_terminal() {
        let raw = |terminal| {
            let (sink, written) = std::sync::mpsc::channel();
            let mut output = Output::for_test(OutputFormat::Raw, terminal, sink);
            output.raw(b"\xff\x1b").unwrap();
            output.finish().unwrap();
            written.into_iter().flatten().collect::<Vec<u8>>()
        };
        assert_eq!(raw(false), b"\xff\x1b");
        assert_eq!(raw(true), b"\xff\x1b\n");
    }

    #[test]
    fn a_table_is_aligned_and_its_cells_are_safe() {
        let (sink, written) = std::sync::mpsc::channel();
        let mut output = Output::for_test(OutputFormat::Table, true, sink);
        output
            .table(
                &["KEY", "VALUE"],
                [
                    vec![shown(b"a\n"), cell(b"1")],
                    vec![shown(b"b"), cell(b"22")],
                ],
            )
            .unwrap();
        output.finish().unwrap();
        let text = String::from_utf8(written.into_iter().flatten().collect()).unwrap();
        assert_eq!(text, "KEY  VALUE\na\\n  1\nb    22\n");
    }

    #[test]
    fn a_long_value_is_cut_between_characters() {
        let long = "é".repeat(10_000);
        let text = shown_value(long.as_bytes());
        assert!(
            text.ends_with("é… (20000 bytes; --raw prints all)"),
            "{}",
            &text[text.len() - 60..]
        );
        assert_eq!(cell(long.as_bytes()).chars().count(), CELL_CHARS + 1);
        assert_eq!(cell(b"short"), "short");
        assert!(cell(&[0xff; 500]).ends_with('…'));
    }

    #[test]
    fn times_are_short_and_keep_their_sign() {
        assert_eq!(time(Duration::from_millis(3_200)), "3s 200ms");
        assert_eq!(time(Duration::from_millis(3_600_500)), "1h");
        assert_eq!(ttl(Some(Ttl::Past(Duration::from_secs(3)))), "-3s");
        assert_eq!(ttl(None), "forever");
    }
}
