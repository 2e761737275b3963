"""Operations with device-specific implementations: the only package that dispatches on a device.

``dispatch`` is the registry of implementations. Models call the operations of ``attention``,
``gather``, ``rotary``, ``normalization``, ``resize`` and ``random``; train steps also those of
``updates``.
"""
