//! What the engine of a node's stores may take of its memory.

/// Memory the engine may use for all shards together; soft by a few percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Blocks, indexes and filters read from disk.
    pub block_cache_bytes: usize,
    /// Records of log and states that are not in table files yet.
    pub write_buffer_bytes: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            block_cache_bytes: 64 << 20,
            write_buffer_bytes: 256 << 20,
        }
    }
}
