// Package piv is a PIV card application (NIST SP 800-73-4) as a pure function
// of the commands that it gets: it does no I/O. Keys, the gate before them and
// the PIN's counter are others' (Host, Store).
//
// The card is read only to its reader: certificates and keys come from the
// organisation, never by PUT DATA or GENERATE ASYMMETRIC KEY PAIR.
//
// Section numbers are of SP 800-73-4 part 2, unless another document is named.
package piv

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Slot is a key reference (part 1, table 4b).
type Slot byte

// The slots of this card.
const (
	Authentication     Slot = 0x9a
	Signature          Slot = 0x9c
	KeyManagement      Slot = 0x9d
	CardAuthentication Slot = 0x9e
)

func (s Slot) String() string { return fmt.Sprintf("%02X", byte(s)) }

// Operation is what a private key does.
type Operation byte

// The operations. The zero value is none.
const (
	// SignECDSA signs a digest; the input is at most as long as the curve's
	// field. The output is ASN.1 (SEC 1, C.5).
	SignECDSA Operation = 1
	// RSA raises the input, a padded block as long as the modulus, to the
	// private exponent.
	RSA Operation = 2
	// ECDH agrees on a secret with the input, an uncompressed point. The
	// output is its x coordinate.
	ECDH Operation = 3
)

// Host has the private keys, behind the gate.
type Host interface {
	// Use does op with the key of slot, or answers a *Refusal. It may wait for
	// a finger until ctx ends. pin says whether the PIN was verified.
	Use(ctx context.Context, slot Slot, op Operation, input []byte, pin bool) ([]byte, error)
}

// Verifier has the PIN: *PIN, or NoPIN where the organisation wants none.
type Verifier interface {
	// Verify compares a padded PIN. It answers ErrPIN, ErrBlocked or ErrForm,
	// and any other error where nothing was compared.
	Verify(pin []byte) error
	// Set exchanges the PIN.
	Set(pin []byte) error
	// Left is how many tries are left.
	Left() int
}

// Refusal is an operation that was not done, with what the card answers.
type Refusal struct {
	Status Status
	Why    string
}

func (r *Refusal) Error() string { return r.Why }

// Key is what is known of a slot: its public key, and its certificate in DER,
// empty while there is none.
type Key struct {
	Public      crypto.PublicKey // *rsa.PublicKey of 2048 bits, *ecdsa.PublicKey on P-256 or P-384
	Certificate []byte
}

// Profile is what is on a card.
type Profile struct {
	GUID    [16]byte // of the card; it identifies it to Windows (part 1, section 3.4.1)
	Expires time.Time
	Name    string // printed on the card: its holder
	Agency  string // and the organisation
	Keys    map[Slot]Key
}

// pinIdle is how long a verified PIN stays so without use. QEMU's reader does
// not tell the card that it was reset, so the card forgets by itself.
const pinIdle = 2 * time.Minute

// aid is the card application's identifier with its version (part 1, section
// 2.2). Readers may leave the version's two bytes off.
var aid = []byte{0xa0, 0x00, 0x00, 0x03, 0x08, 0x00, 0x00, 0x10, 0x00, 0x01, 0x00}

// maxChain bounds the data of chained commands in bytes.
const maxChain = 4096

// Card is a card in a reader. Its methods are safe for concurrent use; commands
// are answered one after the other.
type Card struct {
	host Host
	pin  Verifier
	now  func() time.Time

	mu       sync.Mutex
	objects  map[uint32][]byte
	keys     map[Slot]Key
	selected bool
	verified time.Time // when the PIN was last verified or used, zero if not
	chain    Command   // the chained command so far
	chaining bool
	pending  []byte // response not yet fetched
}

// New returns a card with the given content.
func New(p Profile, host Host, pin Verifier, now func() time.Time) (*Card, error) {
	c := &Card{host: host, pin: pin, now: now}
	return c, c.Load(p)
}

// Load exchanges the content of the card. Take the card out of the reader
// before, so that nobody goes on with what it read.
func (c *Card) Load(p Profile) error {
	objects, err := p.objects()
	if err != nil {
		return err
	}
	for slot, k := range p.Keys {
		if _, err := algorithm(k.Public); err != nil {
			return fmt.Errorf("piv: key %v: %w", slot, err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.objects, c.keys = objects, p.Keys
	c.reset()
	return nil
}

// Reset is a power-up: everything that was proven is forgotten.
func (c *Card) Reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reset()
}

func (c *Card) reset() {
	c.selected, c.verified = false, time.Time{}
	c.chaining, c.chain, c.pending = false, Command{}, nil
}

// Transmit answers one command APDU with a response APDU.
func (c *Card) Transmit(ctx context.Context, apdu []byte) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	cmd, err := ParseCommand(apdu)
	if err != nil {
		c.chaining, c.pending = false, nil
		return WrongLength.append(nil)
	}
	if cmd.INS == insGetResponse && cmd.CLA == 0 {
		if len(c.pending) == 0 {
			return ConditionsOfUse.append(nil)
		}
		return c.respond(OK, cmd.Ne)
	}
	c.pending = nil // fetched next or not at all (ISO 7816-4, section 5.3.4)
	cmd, status := c.gather(cmd)
	if status != 0 {
		return status.append(nil)
	}
	data, status := c.do(ctx, cmd)
	c.pending = data
	return c.respond(status, cmd.Ne)
}

// respond hands out what is pending, as much as the reader can take. With T=0
// and for readers that name no length, GET RESPONSE fetches it (section 2.4.2).
func (c *Card) respond(status Status, ne int) []byte {
	if status != OK || len(c.pending) == 0 {
		c.pending = nil
		return status.append(nil)
	}
	n := min(ne, len(c.pending))
	out := bytes.Clone(c.pending[:n])
	c.pending = c.pending[n:]
	if len(c.pending) == 0 {
		c.pending = nil
		return OK.append(out)
	}
	more := MoreData
	if left := len(c.pending); left < 256 {
		more += Status(left)
	}
	return more.append(out)
}

// Class bytes (ISO 7816-4, section 5.4.1).
const (
	claChain  = 0x10 // more of this command follows
	claSecure = 0x0c
)

// gather puts chained commands together (section 2.4.1). A status other than 0
// is the answer; otherwise the command is whole.
func (c *Card) gather(cmd Command) (Command, Status) {
	switch {
	case cmd.CLA&claSecure != 0 && cmd.CLA&0xe0 == 0:
		return cmd, NoSecureMessaging
	case cmd.CLA&0x03 != 0 && cmd.CLA&0xe0 == 0:
		return cmd, ChannelUnknown
	case cmd.CLA&^claChain != 0:
		return cmd, UnknownCLA
	}
	if c.chaining && (cmd.INS != c.chain.INS || cmd.P1 != c.chain.P1 || cmd.P2 != c.chain.P2) {
		// Another command ends the chain; it counts as if none had been.
		c.chaining, c.chain = false, Command{}
		if cmd.CLA&claChain == 0 {
			return cmd, 0
		}
	}
	if !c.chaining && cmd.CLA&claChain == 0 {
		return cmd, 0
	}
	if len(c.chain.Data)+len(cmd.Data) > maxChain {
		c.chaining, c.chain = false, Command{}
		return cmd, WrongLength
	}
	data := append(bytes.Clone(c.chain.Data), cmd.Data...)
	last := cmd.CLA&claChain == 0
	cmd.CLA, cmd.Data = 0, data
	if !last {
		c.chaining, c.chain = true, cmd
		return cmd, OK
	}
	c.chaining, c.chain = false, Command{}
	return cmd, 0
}

// Instructions (section 3; ISO 7816-4).
const (
	insVerify       = 0x20
	insChange       = 0x24
	insResetRetry   = 0x2c
	insGenerate     = 0x47
	insAuthenticate = 0x87
	insSelect       = 0xa4
	insGetResponse  = 0xc0
	insGetData      = 0xcb
	insPutData      = 0xdb
)

// do answers a whole command.
func (c *Card) do(ctx context.Context, cmd Command) ([]byte, Status) {
	if cmd.INS == insSelect {
		return c.selectApplication(cmd)
	}
	if !c.selected {
		return nil, UnknownINS
	}
	switch cmd.INS {
	case insGetData:
		return c.getData(cmd)
	case insVerify:
		return nil, c.verify(cmd)
	case insChange:
		return nil, c.change(cmd)
	case insAuthenticate:
		return c.authenticate(ctx, cmd)
	case insPutData, insGenerate:
		return nil, SecurityStatus // only the organisation writes to this card
	case insResetRetry:
		return nil, NoReference // no PUK: an administrator's permit unblocks
	}
	return nil, UnknownINS
}

// selectApplication answers SELECT (section 3.1.1). Selecting the application
// that is selected already changes nothing; another identifier leaves it
// selected.
func (c *Card) selectApplication(cmd Command) ([]byte, Status) {
	if cmd.P1 != 0x04 {
		return nil, NotFound // by name only; Windows also asks for the file 3F00
	}
	if cmd.P2 != 0x00 && cmd.P2 != 0x0c {
		return nil, WrongParameters
	}
	// By the name, with or without version (section 3.1.1); the bare RID is
	// a partial name that several clients use (ISO 7816-4, section 8.2.1.2).
	if n := len(cmd.Data); n < 5 || n > len(aid) || !bytes.Equal(cmd.Data, aid[:n]) {
		return nil, NotFound
	}
	if !c.selected {
		c.selected, c.verified = true, time.Time{}
	}
	if cmd.P2 == 0x0c {
		return nil, OK
	}
	return applicationTemplate(), OK
}

// applicationTemplate is the answer to SELECT (section 3.1.1, table 3).
func applicationTemplate() []byte {
	body := tlv(nil, 0x4f, aid[5:])                 // the application, without the RID
	body = tlv(body, 0x79, tlv(nil, 0x4f, aid[:5])) // its allocating authority
	body = tlv(body, 0x50, []byte("Sekisho logon")) // its name
	body = tlv(body, 0xac, []byte{0x80, 1, 0x07, 0x06, 1, 0x00})
	return tlv(nil, 0x61, body)
}

// getData answers GET DATA (section 3.1.2).
func (c *Card) getData(cmd Command) ([]byte, Status) {
	if cmd.P1 != 0x3f || cmd.P2 != 0xff {
		return nil, WrongParameters
	}
	tag, list, rest, ok := nextTLV(cmd.Data)
	if !ok || tag != 0x5c || len(rest) > 0 || len(list) == 0 || len(list) > 3 {
		return nil, WrongData
	}
	var object uint32
	for _, b := range list {
		object = object<<8 | uint32(b)
	}
	data, ok := c.objects[object]
	if !ok {
		return nil, NotFound
	}
	if object == tagPrinted && !c.authenticated() {
		return nil, SecurityStatus // part 1, table 2
	}
	return data, OK
}

// authenticated reports whether the PIN was verified, and counts as use.
func (c *Card) authenticated() bool {
	now := c.now()
	if c.verified.IsZero() || now.Sub(c.verified) > pinIdle || now.Before(c.verified) {
		c.verified = time.Time{}
		return false
	}
	c.verified = now
	return true
}

// refApplicationPIN is the key reference of the PIN (part 1, table 4b).
const refApplicationPIN = 0x80

// verify answers VERIFY (section 3.2.1).
func (c *Card) verify(cmd Command) Status {
	if cmd.P2 != refApplicationPIN {
		return NoReference
	}
	switch {
	case cmd.P1 == 0xff && len(cmd.Data) == 0: // log out
		c.verified = time.Time{}
		return OK
	case cmd.P1 != 0x00:
		return WrongParameters
	case len(cmd.Data) == 0: // how do things stand
		if c.authenticated() {
			return OK
		}
		return c.tries()
	}
	c.verified = time.Time{}
	if status := c.check(cmd.Data); status != OK {
		return status
	}
	c.verified = c.now()
	return OK
}

// change answers CHANGE REFERENCE DATA (section 3.2.2).
func (c *Card) change(cmd Command) Status {
	switch {
	case cmd.P2 != refApplicationPIN:
		return NoReference
	case cmd.P1 != 0:
		return WrongParameters
	case len(cmd.Data) != 2*pinSize || !wellFormed(cmd.Data[pinSize:]):
		return WrongData
	}
	c.verified = time.Time{}
	if status := c.check(cmd.Data[:pinSize]); status != OK {
		return status
	}
	if err := c.pin.Set(cmd.Data[pinSize:]); err != nil {
		return MemoryFailure
	}
	c.verified = c.now()
	return OK
}

// check compares a PIN with the card's and counts.
func (c *Card) check(pin []byte) Status {
	switch err := c.pin.Verify(pin); {
	case err == nil:
		return OK
	case errors.Is(err, ErrForm):
		return WrongData
	case errors.Is(err, ErrPIN):
		return c.tries()
	case errors.Is(err, ErrBlocked):
		return Blocked
	}
	return MemoryFailure // the count could not be kept, so nothing was compared
}

// tries is the status word that says how many tries are left.
func (c *Card) tries() Status {
	left := c.pin.Left()
	if left == 0 {
		return Blocked
	}
	return VerifyFailed + Status(min(left, 15))
}

// Algorithm references (SP 800-78-4, table 6-2).
const (
	algRSA2048 = 0x07
	algP256    = 0x11
	algP384    = 0x14
)

// algorithm returns the algorithm reference of a key.
func algorithm(public crypto.PublicKey) (byte, error) {
	switch k := public.(type) {
	case *rsa.PublicKey:
		if k.N != nil && k.N.BitLen() == 2048 {
			return algRSA2048, nil
		}
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return algP256, nil
		case elliptic.P384():
			return algP384, nil
		}
	}
	return 0, fmt.Errorf("%T is none of RSA-2048, P-256, P-384", public)
}

// Tags of the dynamic authentication template (section 3.2.4, table 7).
const (
	tagTemplate  = 0x7c
	tagChallenge = 0x81
	tagResponse  = 0x82
	tagExponent  = 0x85
)

// authenticate answers GENERAL AUTHENTICATE (section 3.2.4), in the two forms
// that use a private key: a challenge to be signed or decrypted, and the other
// side's point for a key agreement.
func (c *Card) authenticate(ctx context.Context, cmd Command) ([]byte, Status) {
	if cmd.P2 == refManagement {
		return manage(cmd.Data)
	}
	slot := Slot(cmd.P2)
	key, ok := c.keys[slot]
	if !ok {
		return nil, WrongParameters
	}
	if alg, err := algorithm(key.Public); err != nil || alg != cmd.P1 {
		return nil, WrongParameters
	}
	op, input, ok := operation(slot, key.Public, cmd.Data)
	if !ok {
		return nil, WrongData
	}
	pin := c.authenticated()
	if slot == Signature {
		c.verified = time.Time{} // part 1, table 4b: the PIN for each signature
	}
	out, err := c.host.Use(ctx, slot, op, input, pin)
	var refusal *Refusal
	switch {
	case errors.As(err, &refusal):
		return nil, refusal.Status
	case err != nil || len(out) == 0:
		return nil, ExecutionError
	}
	return tlv(nil, tagTemplate, tlv(nil, tagResponse, out)), OK
}

// refManagement is the card management key (part 1, table 4b). This card has
// none: whoever asks for a challenge gets random bytes, which OpenSC uses as
// such, and no answer to it is right.
const refManagement = 0x9b

func manage(data []byte) ([]byte, Status) {
	if !bytes.Equal(data, []byte{tagTemplate, 2, tagChallenge, 0}) {
		return nil, SecurityStatus
	}
	random := make([]byte, 16)
	rand.Read(random)
	return tlv(nil, tagTemplate, tlv(nil, tagChallenge, random)), OK
}

// operation reads a dynamic authentication template for a key.
func operation(slot Slot, public crypto.PublicKey, data []byte) (Operation, []byte, bool) {
	tag, body, rest, ok := nextTLV(data)
	if !ok || tag != tagTemplate || len(rest) > 0 {
		return 0, nil, false
	}
	var asked bool
	var kind byte
	var input []byte
	for len(body) > 0 {
		tag, value, more, ok := nextTLV(body)
		switch {
		case !ok:
			return 0, nil, false
		case tag == tagResponse && len(value) == 0 && !asked:
			asked = true
		case (tag == tagChallenge || tag == tagExponent) && kind == 0 && len(value) > 0:
			kind, input = tag, value
		default:
			return 0, nil, false
		}
		body = more
	}
	if !asked || kind == 0 {
		return 0, nil, false
	}
	switch k := public.(type) {
	case *rsa.PublicKey:
		return RSA, input, kind == tagChallenge && len(input) == k.Size()
	case *ecdsa.PublicKey:
		if kind == tagChallenge {
			return SignECDSA, input, slot != KeyManagement && len(input) <= (k.Curve.Params().BitSize+7)/8
		}
		curve, err := k.ECDH()
		if err != nil || slot != KeyManagement {
			return 0, nil, false
		}
		point, err := curve.Curve().NewPublicKey(input)
		return ECDH, input, err == nil && isPoint(point)
	}
	return 0, nil, false
}

// isPoint reports that a point was read: on its curve and not at infinity.
func isPoint(p *ecdh.PublicKey) bool { return p != nil }
