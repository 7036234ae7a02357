// Package disk is the work domain's encrypted disk: LUKS2 on dm-crypt, whose
// key attestd unseals from the TPM for the one boot that the release signed.
// It makes the disk at the first boot, opens it at the others, by policy puts
// a layer over it that is gone at power-off, and destroys its key on order.
//
// The key goes to cryptsetup(8) over a pipe and is wiped here; in the kernel
// it stays in dm-crypt.
package disk

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"sekisho/attest"
	"sekisho/attest/gate"
	"sekisho/hostos/store"
)

// Programs of Debian's packages cryptsetup-bin and dmsetup.
const (
	Cryptsetup = "/usr/sbin/cryptsetup"
	DMSetup    = "/usr/sbin/dmsetup"
)

// Names of devices of the device mapper.
const (
	workName    = "sekisho-work"
	scratchName = "sekisho-scratch"
	layerName   = "sekisho-layer"
)

// HeaderSize is what stands before the data of the volume, in bytes. All of it
// is covered by the volume's tag.
const HeaderSize = 1 << 20

// sector is dm's unit in bytes. The work domain's disk has sectors of this
// size, so the volume's must not be larger.
const sector = 512

// Keys gives keys; *gate.Client has it.
type Keys interface {
	Unlock(context.Context, gate.UnlockRequest) ([]byte, error)
	NewVolume(context.Context, gate.VolumeRequest) (gate.NewVolume, error)
	BindVolume(context.Context, gate.BindRequest) ([]byte, error)
	Recover(context.Context, gate.RecoverRequest) (gate.RecoverResponse, error)
}

// Config is what a Disk is made of. All fields but Scratch are needed.
type Config struct {
	Partition string       // encrypted
	Factory   string       // the work domain as it was delivered, in the clear
	Scratch   string       // partition for Ephemeral
	Record    store.Record // the volume's sealed key
	Release   string       // file with the image's signed policies
	Ephemeral bool
	Keys      Keys
	// Run runs a program with stdin, and returns its error output in the error.
	Run    func(ctx context.Context, stdin []byte, argv ...string) error
	Mapper string // /dev/mapper
	// Say tells whoever sits at the console.
	Say func(format string, args ...any)
	Now func() time.Time
}

// States of the disk.
const (
	Locked  = "locked" // not opened yet, or refused: Codes say why
	Making  = "making"
	Open    = "open"
	Wiped   = "wiped"
	bindGap = time.Second // between attempts to have the recovery key escrowed
	tryGap  = 500 * time.Millisecond
)

// Status is how the disk stands.
type Status struct {
	State  string    `json:"state"`
	Since  time.Time `json:"since"`
	Codes  []string  `json:"codes,omitempty"` // why it stays locked
	Detail string    `json:"detail,omitempty"`
	Mode   string    `json:"mode"` // attest.DiskPersistent or attest.DiskEphemeral
}

// Disk is the work domain's disk. Its methods are safe for concurrent use.
type Disk struct {
	Config
	busy sync.Mutex         // held while the disk is opened, made or wiped
	life context.Context    // ends with an order to wipe: nothing opens the disk after it
	end  context.CancelFunc // of life

	mu     sync.Mutex
	status Status
}

// New returns the disk, locked.
func New(c Config) *Disk {
	d := &Disk{Config: c}
	d.life, d.end = context.WithCancel(context.Background())
	d.set(Status{State: Locked})
	return d
}

// Status returns how the disk stands.
func (d *Disk) Status() Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.status
}

func (d *Disk) set(s Status) {
	s.Since, s.Mode = d.Now(), attest.DiskPersistent
	if d.Ephemeral {
		s.Mode = attest.DiskEphemeral
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status = s
}

// States of the record on the partition sekisho-host. The zero value is a
// laptop that never had a disk.
const (
	recordMaking = "making" // begun; what is on the partition is worth nothing
	recordSealed = "sealed"
	recordWiped  = "wiped"
)

// record is what is remembered of the volume. It is not secret.
type record struct {
	State  string    `json:"state"`
	Volume []byte    `json:"volume,omitempty"` // attest/seal.Volume
	Since  time.Time `json:"since"`
}

func (d *Disk) load() (record, error) {
	data, err := d.Record.Load()
	if errors.Is(err, store.ErrNone) {
		return record{}, nil
	}
	if err != nil {
		return record{}, err
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, fmt.Errorf("record of the work disk: %w", err)
	}
	return r, nil
}

func (d *Disk) store(r record) error {
	if r.Since.IsZero() {
		r.Since = d.Now().UTC()
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return d.Record.Store(data)
}

// Open opens the disk, and makes it if this laptop never had one. It waits for
// attestd, and at the first boot for the verifier to take the recovery key. It
// returns the block device for the work domain, or a *Fault.
func (d *Disk) Open(ctx context.Context) (device string, err error) {
	return d.work(ctx, func(ctx context.Context) (string, error) {
		r, err := d.load()
		if err != nil {
			return "", fault(codeRecord, err)
		}
		head, err := d.head()
		if err != nil {
			return "", fault(codeDevice, err)
		}
		release, err := os.ReadFile(d.Release)
		if err != nil {
			return "", fault(gate.CodePolicy, err)
		}
		switch {
		case r.State == recordSealed:
			return d.unlock(ctx, r, head, release)
		case r.State == recordWiped:
			// The power may have cut the wipe short.
			return "", fault(codeWiped, errors.Join(fmt.Errorf("since %s", r.Since.Format(time.RFC3339)), d.destroy(r.Since)))
		case r.State == recordMaking, r.State == "" && len(bytes.Trim(head, "\x00")) == 0:
			return d.make(ctx, release)
		}
		return "", fault(codeRecord, errors.New("the partition is not empty and has no record"))
	})
}

// Recover opens the disk by its recovery key, and seals it anew to this TPM if
// that is possible.
func (d *Disk) Recover(ctx context.Context, typed string) (device string, err error) {
	return d.work(ctx, func(ctx context.Context) (string, error) {
		r, err := d.load()
		if err != nil || r.State != recordSealed {
			return "", fault(codeRecord, errors.Join(errors.New("no sealed record"), err))
		}
		head, err := d.head()
		if err != nil {
			return "", fault(codeDevice, err)
		}
		release, err := os.ReadFile(d.Release)
		if err != nil {
			release = []byte("null") // an image without policies cannot seal anew
		}
		k, err := d.Keys.Recover(ctx, gate.RecoverRequest{
			UnlockRequest: gate.UnlockRequest{Volume: r.Volume, Header: sha256.Sum256(head), Release: release}, Recovery: strings.TrimSpace(typed)})
		if err != nil {
			return "", keyFault(err)
		}
		defer clear(k.Key)
		if len(k.Volume) > 0 {
			if err := d.store(record{State: recordSealed, Volume: k.Volume}); err != nil {
				d.Say("warning: the disk is open, and will ask for its recovery key again: %v / ディスクは開きましたが、次回も回復キーが必要です", err)
			}
		}
		return d.attach(ctx, k.Key)
	})
}

// work runs one change of the disk, which an order to wipe interrupts, and
// publishes its outcome.
func (d *Disk) work(ctx context.Context, do func(context.Context) (string, error)) (string, error) {
	d.busy.Lock()
	defer d.busy.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.life, cancel)()
	if s := d.Status(); s.State == Open {
		return d.device(), nil
	}
	device, err := do(ctx)
	if err != nil {
		s := Status{State: Locked, Detail: err.Error()}
		var f *Fault
		if errors.As(err, &f) {
			s.Codes = f.Codes
			if len(f.Codes) == 1 && f.Codes[0] == codeWiped {
				s.State = Wiped
			}
		}
		d.set(s)
		return "", err
	}
	d.set(Status{State: Open})
	return device, nil
}

// device is what the work domain gets.
func (d *Disk) device() string {
	if d.Ephemeral {
		return filepath.Join(d.Mapper, layerName)
	}
	return filepath.Join(d.Mapper, workName)
}

// head reads what stands before the data.
func (d *Disk) head() ([]byte, error) {
	f, err := os.Open(d.Partition)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	head := make([]byte, HeaderSize)
	if _, err := io.ReadFull(f, head); err != nil {
		return nil, fmt.Errorf("%s: %w", d.Partition, err)
	}
	return head, nil
}

// unlock has attestd unseal the key.
func (d *Disk) unlock(ctx context.Context, r record, head, release []byte) (string, error) {
	var key []byte
	err := d.again(ctx, func() (err error) {
		key, err = d.Keys.Unlock(ctx, gate.UnlockRequest{Volume: r.Volume, Header: sha256.Sum256(head), Release: release})
		return err
	})
	if err != nil {
		return "", keyFault(err)
	}
	defer clear(key)
	return d.attach(ctx, key)
}

// again calls attestd until it answers with a key or a reason: it may still be
// starting, or the TPM may come late.
func (d *Disk) again(ctx context.Context, ask func() error) error {
	tick := time.NewTicker(tryGap)
	defer tick.Stop()
	for {
		err := ask()
		var no *gate.KeyRefused
		if err == nil || errors.As(err, &no) && len(no.Codes) > 0 {
			return err
		}
		d.set(Status{State: Locked, Detail: err.Error()})
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// attach opens the volume and, by policy, the layer over it, and returns the
// device for the work domain.
func (d *Disk) attach(ctx context.Context, key []byte) (string, error) {
	if err := d.open(ctx, key, d.Ephemeral); err != nil {
		return "", err
	}
	if d.Ephemeral {
		if err := d.layer(ctx); err != nil {
			return "", fault(codeDevice, err)
		}
	}
	return d.device(), nil
}

// open has dm-crypt take the volume with its key.
func (d *Disk) open(ctx context.Context, key []byte, readOnly bool) error {
	args := []string{Cryptsetup, "open", "--type", "luks2", "--batch-mode", "--key-file", "-",
		"--perf-no_read_workqueue", "--perf-no_write_workqueue"}
	if readOnly {
		args = append(args, "--readonly")
	}
	if err := d.Run(ctx, key, append(args, d.Partition, workName)...); err != nil {
		return fault(codeDevice, err)
	}
	return nil
}

// layer puts over the volume what takes the writes of this boot: a snapshot
// (kernel documentation, device-mapper/snapshot) on the scratch partition,
// encrypted with a key that nobody keeps.
func (d *Disk) layer(ctx context.Context) error {
	size, err := deviceSize(filepath.Join(d.Mapper, workName))
	if err != nil {
		return err
	}
	scratch, layer := LayerCommands(d.Scratch, d.Mapper, size)
	key := make([]byte, LayerKeySize)
	rand.Read(key)
	defer clear(key)
	if err := d.Run(ctx, key, scratch...); err != nil {
		return err
	}
	return d.Run(ctx, nil, layer...)
}

// LayerKeySize is two AES-256 keys of XTS in bytes.
const LayerKeySize = 64

// LayerCommands returns what encrypts the scratch partition, with its key on
// standard input, and what puts it over the volume of size bytes.
func LayerCommands(scratch, mapper string, size int64) (open, create []string) {
	const chunk = 8 // sectors
	return []string{Cryptsetup, "open", "--type", "plain", "--batch-mode", "--cipher", "aes-xts-plain64",
			"--key-size", "512", "--key-file", "-", scratch, scratchName},
		[]string{DMSetup, "create", layerName, "--table", fmt.Sprintf("0 %d snapshot %s %s N %d",
			size/sector, filepath.Join(mapper, workName), filepath.Join(mapper, scratchName), chunk)}
}

func deviceSize(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

// maxMakes bounds how often a boot makes the volume.
const maxMakes = 4

// make makes the volume. Until its last step nothing of it lasts: a power cut
// has the next boot begin again.
func (d *Disk) make(ctx context.Context, release []byte) (string, error) {
	d.Say("making the work disk / 業務ディスクを作成しています")
	if err := d.store(record{State: recordMaking}); err != nil {
		return "", fault(codeRecord, err)
	}
	volume, recovery, err := d.fill(ctx, release)
	for n := 1; n < maxMakes && refusedForNow(err) && ctx.Err() == nil; n++ {
		// attestd has been started anew and knows nothing of this volume.
		if err = d.Run(ctx, nil, Cryptsetup, "close", workName); err != nil {
			return "", fault(codeDevice, err)
		}
		volume, recovery, err = d.fill(ctx, release)
	}
	if err != nil {
		return "", err
	}
	if err := d.store(record{State: recordSealed, Volume: volume}); err != nil {
		return "", fault(codeRecord, err)
	}
	d.Say("recovery key of the work disk, shown this once; the organisation has it in escrow: %s / 回復キー（表示は一度だけです。組織が保管しています）", recovery)
	if d.Ephemeral {
		if err := d.layer(ctx); err != nil {
			return "", fault(codeDevice, err)
		}
	}
	return d.device(), nil
}

// refusedForNow reports whether attestd gave no reason that lasts.
func refusedForNow(err error) bool {
	var no *gate.KeyRefused
	return errors.As(err, &no) && len(no.Codes) == 0
}

// fill makes a volume, with the delivered work domain on it and its recovery
// key in escrow, and leaves it open.
func (d *Disk) fill(ctx context.Context, release []byte) (volume []byte, recovery string, err error) {
	d.set(Status{State: Making})
	var v gate.NewVolume
	if err := d.again(ctx, func() (err error) {
		v, err = d.Keys.NewVolume(ctx, gate.VolumeRequest{Release: release})
		return err
	}); err != nil {
		return nil, "", keyFault(err)
	}
	defer clear(v.Key)
	d.set(Status{State: Making})
	if err := d.Run(ctx, v.Key, formatArgs(d.Partition)...); err != nil {
		return nil, "", fault(codeDevice, err)
	}
	head, err := d.head()
	if err != nil {
		return nil, "", fault(codeDevice, err)
	}
	if err := d.open(ctx, v.Key, false); err != nil {
		return nil, "", err
	}
	if err := copyImage(ctx, filepath.Join(d.Mapper, workName), d.Factory); err != nil {
		return nil, "", fault(codeDevice, fmt.Errorf("write the delivered work domain: %w", err))
	}
	if volume, err = d.bind(ctx, v.ID, head); err != nil {
		return nil, "", keyFault(err)
	}
	return volume, v.Recovery, nil
}

// formatArgs makes a LUKS2 volume with one key slot. The key is random, so
// that hashing it slowly would only cost time.
func formatArgs(partition string) []string {
	return []string{Cryptsetup, "luksFormat", "--type", "luks2", "--batch-mode", "--key-file", "-",
		"--cipher", "aes-xts-plain64", "--key-size", "512", "--hash", "sha256", "--sector-size", strconv.Itoa(sector),
		"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
		"--luks2-metadata-size", "16k", "--luks2-keyslots-size", "512k",
		"--offset", strconv.Itoa(HeaderSize / sector), partition}
}

// bind waits until the organisation has the recovery key in escrow, or attestd
// refuses.
func (d *Disk) bind(ctx context.Context, id, head []byte) ([]byte, error) {
	tick := time.NewTicker(bindGap)
	defer tick.Stop()
	for said := false; ; {
		volume, err := d.Keys.BindVolume(ctx, gate.BindRequest{ID: id, Header: sha256.Sum256(head)})
		var no *gate.KeyRefused
		if err == nil || errors.As(err, &no) {
			return volume, err
		}
		d.set(Status{State: Making, Detail: err.Error()})
		if !said {
			d.Say("the work disk is made once the verifier has affirmed this laptop and taken the recovery key into escrow / 業務ディスクは、検証サーバーがこの端末を承認し、回復キーを預かった後に完成します")
			said = true
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-tick.C:
		}
	}
}

// copyImage writes the image to the device and returns when it is durable.
// Zeros are written too: what a fresh volume decrypts to is noise.
func copyImage(ctx context.Context, device, image string) error {
	src, err := os.Open(image)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{dst}, &until{ctx, src}, make([]byte, 1<<20))
	return errors.Join(err, dst.Sync(), dst.Close())
}

// until is a reader that ends with its context.
type until struct {
	ctx context.Context
	r   io.Reader
}

func (u *until) Read(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.r.Read(p)
}

// Wipe destroys the key: the sealed record in both its places and the volume's
// header. What is left on the partition opens for nobody, the recovery key
// included. It interrupts whoever is opening the disk; once it has begun, the
// next boot ends what the power cuts short.
func (d *Disk) Wipe() error {
	d.end()
	d.busy.Lock()
	defer d.busy.Unlock()
	if err := d.destroy(time.Time{}); err != nil {
		return fmt.Errorf("wipe the work disk: %w", err)
	}
	d.set(Status{State: Wiped})
	return nil
}

// destroy overwrites the record's one place, the header, and the other place.
func (d *Disk) destroy(since time.Time) error {
	gone := record{State: recordWiped, Since: since}
	err := d.store(gone)
	f, oerr := os.OpenFile(d.Partition, os.O_WRONLY, 0)
	if oerr != nil {
		return errors.Join(err, oerr, d.store(gone))
	}
	noise := make([]byte, HeaderSize)
	rand.Read(noise)
	_, werr := f.WriteAt(noise, 0)
	return errors.Join(err, werr, f.Sync(), f.Close(), d.store(gone))
}
