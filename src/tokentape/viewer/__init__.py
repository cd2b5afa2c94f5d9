"""The viewer: a page that shows sessions, their branches, and every token of a tape. It only reads.

source    where sessions come from, as a protocol: a gateway, a store, a file
stored    a store as source
files     a Parquet file of samples as source
episode   a session as the page shows it: from recorded turns, or from samples
glyphs    tokens as text that can be looked at: what is invisible or hostile is spelled out
strip     a branch's tokens: lines, pieces, search, the first difference
drift     where encoding the text again would give other ids
scores    what an engine says of a branch's tokens now
desk      answers the page's questions; knows no HTTP
app       routes; the page itself lies in `static`, hand-written, with nothing from the network
"""
