//! Content codings: gzip and zstd undone, whether or not they were asked for.
//!
//! Promises that decoding ends at the bound: a few kilobytes that unfold to gigabytes (a
//! decompression bomb) cost the bound and no more. Must never know where a body came from.

use std::io::Read;

use bytes::Bytes;
use flate2::bufread::MultiGzDecoder;
use holdfast_proto::v1::FailureClass;
use http::header::{self, HeaderMap};
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

/// What a zstd frame may make its decoder hold, unless the whole body may be more: what every
/// decoder of HTTP grants (RFC 9659).
const ZSTD_WINDOW_BYTES_MIN: u64 = 8 << 20;

/// How a body is coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coding {
    Identity,
    Gzip,
    Zstd,
}

impl Coding {
    /// `None` for what cannot be decoded, such as two codings over one another.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut codings = headers.get_all(header::CONTENT_ENCODING).iter();
        let coding = codings.next().map_or("identity", |coding| {
            coding.to_str().unwrap_or_default().trim()
        });
        Self::named(coding).filter(|_| codings.next().is_none())
    }

    /// As `Content-Encoding` and `Accept-Encoding` name it (RFC 9110 §8.4.1, RFC 8878 §7.2).
    pub(super) fn named(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "" | "identity" => Some(Self::Identity),
            "gzip" | "x-gzip" => Some(Self::Gzip),
            "zstd" => Some(Self::Zstd),
            _ => None,
        }
    }

    /// A body without a byte stays one: some servers name a coding all the same.
    pub(super) fn decode(self, body: Bytes, bytes_max: u64) -> Result<Bytes, FailureClass> {
        if body.is_empty() {
            return Ok(body);
        }
        match self {
            Self::Identity => Ok(body),
            Self::Gzip => {
                let mut decoded = Vec::new();
                read(MultiGzDecoder::new(&*body), &mut decoded, bytes_max)?;
                Ok(decoded.into())
            }
            Self::Zstd => decode_zstd(&body, bytes_max),
        }
    }
}

/// All that there is, after what is decoded already; too much is an error.
fn read(decoder: impl Read, decoded: &mut Vec<u8>, bytes_max: u64) -> Result<(), FailureClass> {
    let left = bytes_max.saturating_sub(decoded.len() as u64);
    decoder
        .take(left + 1)
        .read_to_end(decoded)
        .map_err(|_| FailureClass::Malformed)?;
    if decoded.len() as u64 > bytes_max {
        return Err(FailureClass::TooLarge);
    }
    Ok(())
}

/// Frame after frame; skippable ones carry nothing (RFC 8878 §3.1.2).
fn decode_zstd(mut body: &[u8], bytes_max: u64) -> Result<Bytes, FailureClass> {
    let mut decoded = Vec::new();
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(bytes_max.max(ZSTD_WINDOW_BYTES_MIN));
    while !body.is_empty() {
        match StreamingDecoder::new_with_decoder(&mut body, &mut decoder) {
            Ok(frame) => read(frame, &mut decoded, bytes_max)?,
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                length,
                ..
            })) => {
                body = body.get(length as usize..).ok_or(FailureClass::Malformed)?;
                continue;
            }
            Err(_) => return Err(FailureClass::Malformed),
        }
        let said = decoder.get_checksum_from_data();
        if said.is_some() && said != decoder.get_calculated_checksum() {
            return Err(FailureClass::Malformed);
        }
    }
    Ok(decoded.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(text: &[u8]) -> Bytes {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap().into()
    }

    fn zstd(text: &[u8]) -> Bytes {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        ruzstd::encoding::compress_to_vec(text, level).into()
    }

    type Encode = fn(&[u8]) -> Bytes;

    fn both() -> [(Coding, Encode); 2] {
        [(Coding::Gzip, gzip), (Coding::Zstd, zstd)]
    }

    #[test]
    fn what_was_coded_comes_back_exactly_also_in_several_pieces() {
        let text: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
        for (coding, encode) in both() {
            let body = encode(&text);
            assert_eq!(coding.decode(body, 800_000).unwrap(), text, "{coding:?}");
            let twice = [encode(b"a"), encode(b"b")].concat().into();
            assert_eq!(coding.decode(twice, 2).unwrap(), "ab", "{coding:?}");
            assert_eq!(coding.decode(Bytes::new(), 2).unwrap(), "", "{coding:?}");
        }
        let skipped = [&b"\x50\x2a\x4d\x18\x03\0\0\0abc"[..], &zstd(b"a")].concat();
        assert_eq!(Coding::Zstd.decode(skipped.into(), 9).unwrap(), "a");
    }

    #[test]
    fn a_bomb_costs_no_more_than_the_bound() {
        for (coding, encode) in both() {
            let bomb = encode(&vec![0; 8 << 20]);
            assert!(bomb.len() < 1 << 20, "{coding:?} {}", bomb.len());
            let failed = coding.decode(bomb.clone(), 1 << 20);
            assert_eq!(failed, Err(FailureClass::TooLarge), "{coding:?}");
            // Nor does a second piece begin the count again.
            let twice: Bytes = [encode(&[0; 600]), encode(&[0; 600])].concat().into();
            let failed = coding.decode(twice.clone(), 1199);
            assert_eq!(failed, Err(FailureClass::TooLarge), "{coding:?}");
            assert_eq!(coding.decode(twice, 1200).unwrap().len(), 1200);
        }
    }

    #[test]
    fn decoding_stops_at_the_bound() {
        let mut decoded = vec![0; 10];
        let failed = read(std::io::repeat(0), &mut decoded, 1000);
        assert_eq!(failed, Err(FailureClass::TooLarge));
        assert_eq!(decoded.len(), 1001);
    }

    #[test]
    fn what_is_cut_or_changed_is_malformed() {
        for (coding, encode) in both() {
            let whole = encode(b"a value of some length, whole and unchanged");
            for end in 1..whole.len() {
                let cut = coding.decode(whole.slice(..end), 1000);
                assert_eq!(cut, Err(FailureClass::Malformed), "{coding:?} {end}");
            }
            for junk in [&b"junk"[..], b"{}"] {
                let followed = [&whole, junk].concat().into();
                let failed = coding.decode(followed, 1000);
                assert_eq!(failed, Err(FailureClass::Malformed), "{coding:?}");
                let plain = coding.decode(Bytes::from_static(b"{\"a\": 1}"), 1000);
                assert_eq!(plain, Err(FailureClass::Malformed), "{coding:?}");
            }
        }
    }

    #[test]
    fn one_coding_that_is_known_can_be_undone() {
        let of = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::CONTENT_ENCODING, value.parse().unwrap());
            }
            Coding::of(&headers)
        };
        assert_eq!(of(&[]), Some(Coding::Identity));
        assert_eq!(of(&["Identity"]), Some(Coding::Identity));
        assert_eq!(of(&["GZIP "]), Some(Coding::Gzip));
        assert_eq!(of(&["x-gzip"]), Some(Coding::Gzip));
        assert_eq!(of(&["zstd"]), Some(Coding::Zstd));
        for unknown in [
            &["br"][..],
            &["deflate"],
            &["gzip, gzip"],
            &["gzip", "gzip"],
        ] {
            assert_eq!(of(unknown), None, "{unknown:?}");
        }
    }
}
