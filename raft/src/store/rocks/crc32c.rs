//! CRC-32C (Castagnoli, RFC 3720), the checksum of RocksDB's log records: eight tables, eight bytes
//! a step. Once at a start, over what RocksDB is about to replay.

const POLYNOMIAL: u32 = 0x82F6_3B78;

const TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0u32; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (if crc & 1 == 1 { POLYNOMIAL } else { 0 });
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[table - 1][byte];
            tables[table][byte] = (before >> 8) ^ tables[0][(before & 0xFF) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
}

/// A checksum under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Crc32c(u32);

impl Crc32c {
    pub(super) fn new() -> Self {
        Self(!0)
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        let mut crc = self.0;
        let (steps, rest) = bytes.as_chunks::<8>();
        for step in steps {
            let low = crc ^ u32::from_le_bytes([step[0], step[1], step[2], step[3]]);
            let mixed = [low.to_le_bytes(), [step[4], step[5], step[6], step[7]]];
            crc = (0..8).fold(0, |mixing, at| {
                mixing ^ TABLES[7 - at][usize::from(mixed[at / 4][at % 4])]
            });
        }
        for byte in rest {
            crc = (crc >> 8) ^ TABLES[0][usize::from(crc.to_le_bytes()[0] ^ byte)];
        }
        self.0 = crc;
    }

    /// As RocksDB stores it: turned and moved, because a checksum of bytes that hold their own
    /// checksum is weak.
    pub(super) fn masked(self) -> u32 {
        (!self.0).rotate_right(15).wrapping_add(0xA282_EAD8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_checksums_are_computed_in_any_steps() {
        for (bytes, crc) in [
            (&b"123456789"[..], 0xE306_9283u32),
            (&[0; 32][..], 0x8A91_36AA),
            (&[0xFF; 32][..], 0x62A8_AB43),
        ] {
            for split in 0..bytes.len() {
                let mut sum = Crc32c::new();
                sum.update(&bytes[..split]);
                sum.update(&bytes[split..]);
                assert_eq!(!sum.0, crc);
            }
        }
    }
}
