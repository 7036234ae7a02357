package piv

// ATR is the card's answer to reset (ISO 7816-3, section 8.2): protocol T=0
// alone, because QEMU's reader has no other, with a waiting time of 13 s at its
// 4 MHz (section 10.2), because an answer may wait for a finger; and historical bytes that name the PIV application, by
// which readers know the card at first sight (ISO 7816-4, section 12.1.1:
// category 0x80, then compact TLVs; tag F is an application identifier).
func ATR() []byte {
	const (
		direct = 0x3b // TS
		td     = 0x80 // TD follows
		tc     = 0x40 // TC follows; T=0, so there is no TCK
		// TC2: WI. QEMU (7.2, 10.0: check_atr of ccid-card-passthru.c) takes the
		// byte after TD1 for TD2 and refuses what does not fit that: of the high
		// nibble only one bit may be set.
		waiting    = 0x8f
		compactTLV = 0x80
	)
	name := aid[:9]
	historical := append([]byte{compactTLV, 0xf0 | byte(len(name))}, name...)
	return append([]byte{direct, td | byte(len(historical)), tc, waiting}, historical...)
}
