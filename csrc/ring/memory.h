// How the ring touches memory that two processes see. A test puts its own words in this place (tests/ring): words that
// stop before each access, so that every order of the two sides is run, or words of weaker order, to see them caught.
#pragma once

#ifdef DFLASH_RING_MEMORY
#include DFLASH_RING_MEMORY
#else

#include <atomic>

namespace dflash::ring {

template <typename T>
using Word = std::atomic<T>;

// A record's header needs no order of its own: only `head` and `tail` say whose its bytes are. (As an assignment, which
// the compiler takes apart: a memcpy() of fields that were just stored waits for them.)
template <typename Header>
void copy_header(Header& to, const Header& from) {
  to = from;
}

}  // namespace dflash::ring

#endif
